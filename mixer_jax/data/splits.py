"""Which examples a run trains and tests on: expressions such as "train[:90%]+val"."""

import itertools
import logging
import math
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mixer_jax.data.dataset import (
    Dataset,
    DatasetError,
    Part,
    Source,
    default_splits,
)
from mixer_jax.data.decode import ImageError
from mixer_jax.data.names import find_split, listing

logger = logging.getLogger(__name__)

TRIALS = 20  # images that are tried before a split counts as unreadable


def parse_split(where: str, sizes: Mapping[str, int], expression: str) -> list[Part]:
    """Reads "train", "train[:90%]", "train[100:200]", or several joined by "+".

    Args:
      where: the dataset, for messages.
      sizes: the number of examples of each whole split.
      expression: what to read. A split is found by its name in any letter case, and the
        usual three by what people call them; see `find_split`.

    Raises:
      DatasetError: it cannot be read, names no split, or selects nothing.
    """
    if expression in sizes:  # perhaps with a plus or brackets in its name
        return [Part(expression, 0, sizes[expression])]
    return [_parse_part(where, sizes, part) for part in expression.split("+")]


def _parse_part(where: str, sizes: Mapping[str, int], expression: str) -> Part:
    match = re.fullmatch(
        r"\s*(?P<split>[^\[\]]+?)\s*"
        r"(\[\s*(?P<start>-?\d+%?)?\s*:\s*(?P<stop>-?\d+%?)?\s*\])?\s*",
        expression,
    )
    if match is None or any(
        x and x.endswith("%") and abs(int(x[:-1])) > 100
        for x in (match["start"], match["stop"])
    ):
        raise DatasetError(
            f"{where}: cannot read the split {expression!r}. Expected something like "
            "'train', 'train[:90%]', 'train[100:200]' or 'train+val'."
        )
    split = find_split(match["split"], list(sizes))
    if split is None:
        raise DatasetError(_no_split(where, list(sizes), match["split"]))
    size = sizes[split]
    start = _position(match["start"] or "0", size)
    stop = _position(match["stop"] or "100%", size)
    if start >= stop:
        raise DatasetError(
            f"{where}: the split {expression!r} is empty; {split!r} has {size} "
            "examples."
        )
    return Part(split, start, stop)


def _position(text: str, length: int) -> int:
    """Reads "10%" or "100" as a position; rounds to the nearest one, as TFDS does."""
    percent = text.endswith("%")
    value = round(int(text[:-1]) * length / 100) if percent else int(text)
    return min(max(value + length if value < 0 else value, 0), length)


def _no_split(where: str, names: Sequence[str], wanted: str) -> str:
    train = find_split("train", names)
    others = [name for name in names if name != train]
    hint = (
        f"To test on {others[0]!r}: --config.pp.test={others[0]}, or --split "
        f"{others[0]} of mixer-jax evaluate."
        if others
        else f"To keep a part for testing: --config.pp.train='{train}[:90%]' "
        f"--config.pp.test='{train}[90%:]'."
    )
    return (
        f"{where} has no split {wanted!r}; it has {', '.join(map(repr, names))}. {hint}"
    )


def choose_splits(
    name: str, dataset: Dataset, train: str | None = None, test: str | None = None
) -> tuple[str, str]:
    """Returns the expressions of the splits to train and to test on.

    Args:
      name: of the dataset, as `open_dataset` takes it.
      dataset: what that returned.
      train: what the user wants to train on, if anything.
      test: what the user wants to test on, if anything. Without it, it is what is usual
        for the dataset; or the split for validation, if there is none for testing,
        which is said.
    """
    usual_train, usual_test = default_splits(name)
    if not test and find_split(usual_test, dataset.split_names) is None:
        validation = find_split("validation", dataset.split_names)
        if usual_test == "test" and validation:
            logger.warning(
                "%s has no split test; %s is taken to test on. pp.test, or --split of "
                "mixer-jax evaluate, names another.",
                name,
                validation,
            )
            usual_test = validation
    return train or usual_train, test or usual_test


def check_splits(dataset: Dataset, train: str, test: str) -> None:
    """Looks for what would spoil a run, before it starts.

    Warns of examples that are trained and tested on or twice in a split, and of classes
    that a slice lacks.

    Args:
      dataset: see `open_dataset`.
      train: the expression of the split to train on.
      test: that of the split to test on.

    Raises:
      DatasetError: there is one class only, or images from all over a split cannot be
        read or have no labels.
    """
    names = dataset.class_names
    if len(names) < 2:
        raise DatasetError(
            f"{dataset.name} has one class ({listing(list(names))}): there is nothing "
            "to tell apart. Expected several. Is the folder one level too high or too "
            "low? It should have <split>/<class>/<image> or <class>/<image>."
        )
    parts = {x: dataset.parts(x) for x in (train, test)}
    for expression, members in parts.items():
        size = count_parts(members)
        if twice := size - count_shared(members, members):
            logger.warning(
                "%s: %d of the %d examples of %s are there twice",
                dataset.name,
                twice,
                size,
                expression,
            )
    if shared := count_shared(parts[train], parts[test]):
        logger.warning(
            "%s: %d examples of the split to test on (%s) are also in the one to train "
            "on (%s); the accuracy on them says little",
            dataset.name,
            shared,
            test,
            train,
        )
    for expression in parts:
        source = dataset.split(expression)
        check_readable(f"{dataset.name}, {expression}", source)
        if expression not in dataset.split_names:  # of whole splits it is told already
            _warn_of_missing_classes(dataset, expression, source)


def _warn_of_missing_classes(dataset: Dataset, expression: str, source: Source) -> None:
    """Warns of classes without an image in a slice, if the labels are in memory."""
    labels = getattr(source, "labels", None)
    if labels is None:
        return
    if labels.dtype == object:  # of each image a tuple
        labels = list(itertools.chain.from_iterable(labels))
    found = set(np.unique(labels).tolist())
    missing = [x for i, x in enumerate(dataset.class_names) if i not in found]
    if missing:
        logger.warning(
            "%s: %d of %d classes have no image in %s: %s",
            dataset.name,
            len(missing),
            len(dataset.class_names),
            expression,
            listing(missing, 10),
        )


def count_parts(parts: Sequence[Part]) -> int:
    """Returns how many examples the parts of an expression are."""
    return sum(part.stop - part.start for part in parts)


def count_shared(first: Sequence[Part], second: Sequence[Part]) -> int:
    """Returns how many examples of a dataset are in both of two expressions' parts.

    `count_shared(parts, parts)` is the number of different examples of one expression.
    """
    shared = 0
    for split in {part.split for part in first}:
        both = [[x for x in parts if x.split == split] for parts in (first, second)]
        ends = sorted({end for x in (*both[0], *both[1]) for end in (x.start, x.stop)})
        for start, stop in itertools.pairwise(ends):
            if all(any(x.start <= start < x.stop for x in parts) for parts in both):
                shared += stop - start
    return shared


def check_readable(where: str, source: Source) -> None:
    """Reads images from all over a split, until one can be read and has a label.

    Raises:
      DatasetError: none of up to TRIALS can be read, or none has a label.
    """
    errors, step = [], math.ceil(len(source) / TRIALS)
    tried = [source[i] for i in range(0, len(source), step)]
    shown = f"{len(tried)} images{', spread over the split,' if step > 1 else ''}"
    searched = shown
    has_label = any(example.labels for example in tried)
    if not has_label and tried[0].label == ():
        # Where images may have several labels, most may have none.
        searched = f"{len(source)} images"
        has_label = any(source[i].labels for i in range(len(source)))
    if not has_label:
        raise DatasetError(
            f"{where}: none of {searched} has a label. Expected a split "
            "with labels; name another one."
        )
    for example in tried:
        try:
            example.pixels()
        except ImageError as error:
            errors.append(f"{example.name}: {error}")
        else:
            return
    raise DatasetError(
        f"{where}: none of {shown} can be read. The first is {errors[0]}. "
        "`mixer-jax data check` lists them all."
    )
