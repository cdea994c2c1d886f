"""Datasets that list all their examples in memory, and scikit-learn's digits."""

import dataclasses
import pathlib
import re
from collections.abc import Mapping, Sequence

import einops
import numpy as np

from mixer_jax.data.dataset import DatasetError, Example, Source


@dataclasses.dataclass(frozen=True)
class ListedSource:
    """Images in memory, or the paths of image files, with their labels.

    Attributes:
      images: uint8 [n, height, width, 3]; or an array of n strings, each a path.
      labels: int [n].
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Example:
        image, label = self.images[index], int(self.labels[index])
        if isinstance(image, str):
            return Example(pathlib.Path(image), label, image)
        return Example(image, label, f"example {index}")

    def take(self, indices: np.ndarray) -> "ListedSource":
        """Returns the examples at the given positions."""
        return ListedSource(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class ListedDataset:
    """A dataset whose splits are all listed in memory.

    Attributes:
      name: as the user gave it, for messages.
      class_names: see Dataset.
      splits: the examples of each whole split.
    """

    name: str
    class_names: Sequence[str]
    splits: Mapping[str, ListedSource]

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
                else " To keep a part of train for testing: "
                "--config.pp.train='train[:90%]' --config.pp.test='train[90%:]'."
            )
            raise DatasetError(
                f"{self.name} has no split {match['split']!r}; it has "
                f"{', '.join(map(repr, self.splits))}.{hint}"
            )
        whole = self.splits[match["split"]]
        if expression == match["split"]:
            return whole
        start = _position(match["start"] or "0", len(whole))
        stop = _position(match["stop"] or "100%", len(whole))
        if start >= stop:
            raise DatasetError(
                f"{self.name}: the split {expression!r} is empty; {match['split']!r} "
                f"has {len(whole)} examples."
            )
        return whole.take(_stratified_order(whole.labels)[start:stop])


def open_digits() -> ListedDataset:
    """Opens scikit-learn's 1,797 handwritten digits.

    Every fifth image of each class is in the split "test", the others are in "train".
    """
    from sklearn.datasets import load_digits  # takes a second to import

    data = load_digits()
    grey = np.rint(data.images * (255 / 16)).astype(np.uint8)  # has 17 levels
    images = einops.repeat(grey, "n height width -> n height width rgb", rgb=3)
    labels = data.target.astype(np.int64)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[::5]] = True
    return ListedDataset(
        "digits",
        [str(name) for name in data.target_names],
        {
            "train": ListedSource(images[~is_test], labels[~is_test]),
            "test": ListedSource(images[is_test], labels[is_test]),
        },
    )


def _position(text: str, length: int) -> int:
    """Reads "10%" or "100" as a position; rounds to the nearest one, as TFDS does."""
    percent = text.endswith("%")
    value = round(int(text[:-1]) * length / 100) if percent else int(text)
    return min(max(value + length if value < 0 else value, 0), length)


def _stratified_order(labels: np.ndarray, seed: int = 0) -> np.ndarray:
    """Returns a random order in which the examples of each class are evenly spread.

    Any slice of it has nearly the same share of each class as the whole.
    """
    rng = np.random.default_rng(seed)
    position = np.empty(len(labels))
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        position[members] = (np.arange(len(members)) + rng.random()) / len(members)
    return np.argsort(position, kind="stable")
