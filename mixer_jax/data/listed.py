"""Datasets whose examples are listed in memory, and scikit-learn's digits."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import numpy as np

from mixer_jax.data.dataset import DatasetError, Example, Source


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Images that are in memory."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Example:
        return Example(self.images[index], int(self.labels[index]), f"example {index}")

    def take(self, indices: np.ndarray) -> "ArraySource":
        """Returns some of the examples."""
        return ArraySource(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class FileSource:
    """Images in files, to be read by who needs them."""

    paths: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Example:
        path = self.paths[index]
        return Example(pathlib.Path(path), int(self.labels[index]), path)

    def take(self, indices: np.ndarray) -> "FileSource":
        """Returns some of the examples."""
        return FileSource([self.paths[i] for i in indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class ListedDataset:
    """Splits whose examples are all listed."""

    name: str
    class_names: Sequence[str]
    splits: Mapping[str, ArraySource | FileSource]

    @property
    def split_names(self) -> Sequence[str]:
        """See Dataset."""
        return list(self.splits)

    def split(self, expression: str) -> Source:
        """See Dataset."""
        match = re.fullmatch(
            r"(?P<split>[\w-]+)(\[(?P<start>-?\d+%?)?:(?P<stop>-?\d+%?)?\])?",
            expression,
        )
        if match is None:
            raise DatasetError(
                f"{self.name}: cannot read the split {expression!r}. Expected "
                "something like 'train', 'train[:90%]' or 'train[100:200]'."
            )
        if match["split"] not in self.splits:
            others = [split for split in self.splits if split != "train"]
            hint = (
                f" To test on {others[0]!r}: --config.pp.test={others[0]}."
                if others
                else " To hold some of it out: --config.pp.train='train[:90%]' "
                "--config.pp.test='train[90%:]'."
            )
            raise DatasetError(
                f"{self.name} has no split {match['split']!r}; it has "
                f"{', '.join(map(repr, self.splits))}.{hint}"
            )
        whole = self.splits[match["split"]]
        if expression == match["split"]:
            return whole
        start = _bound(match["start"] or "0", len(whole))
        stop = _bound(match["stop"] or "100%", len(whole))
        if start >= stop:
            raise DatasetError(
                f"{self.name}: the split {expression!r} is empty; {match['split']!r} "
                f"has {len(whole)} examples."
            )
        return whole.take(_stratified_order(whole.labels)[start:stop])


def _bound(text: str, length: int) -> int:
    """Reads "10%" or "100" as a position; rounds to the closest, as TFDS does."""
    percent = text.endswith("%")
    value = round(int(text[:-1]) * length / 100) if percent else int(text)
    return min(max(value + length if value < 0 else value, 0), length)


def _stratified_order(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """A shuffled order of which any slice has about each class's share.

    Each class is shuffled and spread evenly over the whole.
    """
    rng = np.random.default_rng(seed)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(position, kind="stable")


def open_digits() -> ListedDataset:
    """scikit-learn's 1,797 handwritten digits, every fifth of a class for testing."""
    from sklearn.datasets import load_digits  # takes a second to import

    data = load_digits()
    levels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(levels[..., None], 3, axis=-1)  # grey as RGB, [1797, 8, 8, 3]
    labels = data.target.astype(np.int64)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[::5]] = True
    return ListedDataset(
        "digits",
        [str(name) for name in data.target_names],
        {
            "train": ArraySource(images[~is_test], labels[~is_test]),
            "test": ArraySource(images[is_test], labels[is_test]),
        },
    )
