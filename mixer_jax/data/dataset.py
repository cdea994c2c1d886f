"""What a dataset is, and `open_dataset`, which opens one by its name.

A dataset has splits. `Dataset.split` returns the examples that an expression such as
"train[:98%]" selects, for access by position.
"""

import dataclasses
import difflib
import logging
import os
import pathlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeVar

import numpy as np

from mixer_jax.data.decode import ImageError, open_pixels, read_file
from mixer_jax.data.jpeg import Pixels, whole
from mixer_jax.data.names import printable

logger = logging.getLogger(__name__)

T = TypeVar("T")

# The splits (train, test) that a run uses if its config names none; for all other
# datasets ("train", "test"). vit_jax does not train on the last 2 % of CIFAR and the
# last 1 % of ImageNet.
DEFAULT_SPLITS = {
    "cifar10": ("train[:98%]", "test"),
    "cifar100": ("train[:98%]", "test"),
    "imagenet2012": ("train[:99%]", "validation"),
}

NO_LABEL = "(no label)"  # stands in tables and figures where a class name would


class DatasetError(ValueError):
    """A dataset that does not exist, cannot be read or does not fit its use."""


class Example(NamedTuple):
    """One image and its label or labels.

    Attributes:
      image: uint8 [height, width, 3]; or the contents of an image file; or its path.
      label: index into the dataset's class names, -1 if the image has no label; a tuple
        of indices in a dataset whose images have several labels.
      name: identifies the example in messages.
    """

    image: np.ndarray | bytes | pathlib.Path
    label: int | tuple[int, ...]
    name: str

    @property
    def labels(self) -> tuple[int, ...]:
        """All labels of the image; () if it has none."""
        if isinstance(self.label, tuple):
            return self.label
        return () if self.label == -1 else (self.label,)

    def open(self) -> Pixels:
        """Returns the image as uint8 [height, width, 3], or as a Jpeg for a transform.

        A user's file is turned upright as its EXIF orientation says, since people see
        their photographs that way. Images of TensorFlow Datasets are taken as they are
        stored, as the original program does.

        Raises:
          ImageError: it cannot be read.
        """
        if isinstance(self.image, np.ndarray):
            return self.image
        if isinstance(self.image, bytes):
            return open_pixels(self.image, name=self.name)
        return open_pixels(read_file(self.image), upright=True, name=self.name)

    def pixels(self) -> np.ndarray:
        """Returns what `open` does, decoded.

        Raises:
          ImageError: it cannot be read.
        """
        return whole(self.open())


def readable(examples: Iterable[Example]) -> Iterator[tuple[Example, np.ndarray]]:
    """Gives the examples that can be read, with their pixels; warns of the others."""
    for example in examples:
        try:
            yield example, example.pixels()
        except ImageError as error:
            logger.warning("skipping %s: %s", printable(example.name), error)


class Source(Protocol):
    """Examples by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Part(NamedTuple):
    """Examples `start` to `stop` - 1 of a whole split, as its slices count them."""

    split: str
    start: int
    stop: int


class Dataset(Protocol):
    """A labelled dataset of one or more splits."""

    @property
    def name(self) -> str:
        """As the user gave it, for messages."""
        ...

    @property
    def split_names(self) -> Sequence[str]:
        """The names of its whole splits, such as "train" and "test"."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes, by label."""
        ...

    def split(self, expression: str) -> Source:
        """Returns the examples of "train", "train[:98%]", "train+val", and so on.

        Raises:
          DatasetError: the expression is malformed, names a split that does not exist,
            or selects nothing.
        """
        ...

    def parts(self, expression: str) -> list[Part]:
        """Returns what an expression selects.

        Raises:
          DatasetError: as `split` does.
        """
        ...

    def columns(self, expression: str) -> Mapping[str, Iterable[bytes]]:
        """Returns what `fingerprint` compares of a split, by what it is called."""
        ...


def open_dataset(
    name: str,
    *,
    data_dir: str | None = None,
    manual_dir: str | None = None,
    label_key: str | None = None,
) -> Dataset:
    """Opens the dataset called `name`.

    Args:
      name: "digits"; a folder of images; a .csv or .tsv file of paths and labels; or
        any name that TensorFlow Datasets knows, such as "cifar10".
      data_dir: where TensorFlow Datasets keeps prepared datasets.
      manual_dir: where it finds files that must be downloaded by hand.
      label_key: the feature of a TensorFlow dataset that holds the label or labels, if
        not the usual one; such as "real_label" of imagenet2012_real.

    Raises:
      DatasetError: there is no such dataset, it cannot be read, or it has no features
        for label_key to choose from.
    """
    # These modules import this one.
    from mixer_jax.data.folders import open_folder
    from mixer_jax.data.listed import open_digits
    from mixer_jax.data.tables import open_table
    from mixer_jax.data.tfds import TfdsDataset, find_name

    if not name.strip():
        raise DatasetError(f"The name of the dataset is empty. {_EXPECTED}")
    path = pathlib.Path(name).expanduser()
    if label_key and (name == "digits" or path.exists()):
        raise DatasetError(
            f"{printable(name)}: found label_key {label_key!r}. Expected none: it "
            "chooses a feature of a dataset of TensorFlow Datasets; digits, folders "
            "and tables have one label column. Leave out label_key (--label-key)."
        )
    if name == "digits":
        if path.exists():
            logger.warning("digits is scikit-learn's; the folder here is ./digits")
        return open_digits()
    if path.is_dir():
        return open_folder(path)
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        return open_table(path)
    if path.is_file():
        raise DatasetError(
            f"{printable(path)} is a file that ends in neither .csv nor .tsv. "
            f"{_EXPECTED} An archive must be unpacked."
        )
    if known := find_name(name, data_dir):
        return TfdsDataset(known, data_dir, manual_dir, label_key)
    raise DatasetError(_no_dataset(name))


def usual_for(name: str, table: Mapping[str, T], default: T) -> T:
    """Returns what a table has for a dataset.

    Args:
      name: of a dataset, as `open_dataset` takes it.
      table: by names of TensorFlow Datasets.
      default: for folders, .csv and .tsv files, and datasets that are not in the table.
    """
    if pathlib.Path(name).expanduser().exists():
        return default
    return {squashed(x): value for x, value in table.items()}.get(
        squashed(name), default
    )


def squashed(name: str) -> str:
    """Returns what all spellings of a name of TensorFlow Datasets have in common.

    "oxford_flowers102:2.1.1", "OxfordFlowers102" and "oxford-flowers102" are one
    dataset, whatever its version and config.
    """
    return re.sub(r"[\s_-]", "", re.split("[:/]", name.strip())[0]).lower()


def default_splits(name: str) -> tuple[str, str]:
    """Returns the split expressions (train, test) that are usual for a dataset."""
    return usual_for(name, DEFAULT_SPLITS, ("train", "test"))


_EXPECTED = (
    'Expected "digits", a folder with train/<class>/<image> and test/<class>/<image>, '
    "a .csv or .tsv file with the columns path and label, or a name of TensorFlow "
    "Datasets."
)


def _no_dataset(name: str) -> str:
    """Says where a dataset was looked for, and what is there of a similar name."""
    from mixer_jax.data.tfds import known_names

    name = name.strip()
    if "://" in name:
        return f"{name!r} is an address. Download it and unpack it first. {_EXPECTED}"
    tried = pathlib.Path(os.path.abspath(os.path.expanduser(name)))
    is_path = pathlib.Path(name).is_absolute() or name.startswith((".", "~"))
    shown = f"folder or .csv/.tsv file {printable(tried)!r}"
    message = f"There is no {shown}."
    if not is_path:
        message = (
            f"There is no dataset {printable(name)!r}: no {shown}, and no dataset of "
            "that name in TensorFlow Datasets."
        )
    if tried.is_symlink():
        return (
            f"{message} The link leads to {os.readlink(tried)!r}, which is not there."
        )
    if os.path.exists(name.replace("\\", "/")):
        return f"{message} Write it with / for the backslash."
    parent = next(x for x in tried.parents if x.is_dir())
    missing = tried.relative_to(parent).parts[0]
    if parent != tried.parent:
        message += f" {printable(parent)} holds no {printable(missing)!r}."
    around = {printable(x).lower(): printable(parent / x) for x in os.listdir(parent)}
    near = difflib.get_close_matches(printable(missing).lower(), around, 3)
    close = [repr(around[x]) for x in near]
    if re.fullmatch(r"[\w -]+(:.*)?", name):  # and no path
        known = {squashed(x): x for x in ("digits", *known_names())}
        near = difflib.get_close_matches(squashed(name), known, 3)
        close += [repr(known[x]) for x in near]
    hint = f" Did you mean {' or '.join(close)}?" if close else ""
    return f"{message}{hint} {_EXPECTED}"


def first_of_each_class(source: Source, num_classes: int, count: int) -> Source:
    """Returns the first `count` examples of each class, or all of a smaller class.

    If the labels are not in memory, examples are read until every class has `count`.

    Raises:
      DatasetError: a class has no example, or an image has several labels.
    """
    labels = getattr(source, "labels", None)
    missing, indices = dict.fromkeys(range(num_classes), count), []
    incomplete = num_classes
    for i in range(len(source)):
        label = source[i].label if labels is None else labels[i]
        if isinstance(label, tuple):
            raise DatasetError(
                f"{source[i].name} has the labels {label}; expected one label for each "
                "image. Use another label_key or dataset."
            )
        if missing.get(label, 0):
            missing[label] -= 1
            indices.append(i)
            incomplete -= not missing[label]
            if not incomplete:
                break
    empty = [label for label, number in missing.items() if number == count]
    if empty:
        raise DatasetError(
            f"{len(empty)} of {num_classes} classes have no example to learn from, the "
            f"first of them class {empty[0]}."
        )
    return Subset(source, indices)


@dataclasses.dataclass(frozen=True)
class Subset:
    """The examples of a source at the given positions."""

    source: Source
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Example:
        return self.source[self.indices[index]]


@dataclasses.dataclass(frozen=True)
class Relabelled:
    """A source whose labels are replaced by those that an array has for them."""

    source: Source
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        example = self.source[index]
        found = tuple(int(self.labels[label]) for label in example.labels)
        if isinstance(example.label, tuple):
            return example._replace(label=found)
        return example._replace(label=found[0] if found else -1)
