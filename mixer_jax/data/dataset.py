"""What a dataset is, and `open_dataset`, which opens one by its name.

A dataset has splits. `Dataset.split` returns the examples that an expression such as
"train[:98%]" selects, for access by position.
"""

import dataclasses
import pathlib
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mixer_jax.data.decode import decode, read_file

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

    def pixels(self) -> np.ndarray:
        """Returns the image as uint8 [height, width, 3].

        A user's file is turned upright as its EXIF orientation says, since people see
        their photographs that way. Images of TensorFlow Datasets are taken as they are
        stored, as the original program does.

        Raises:
          ImageError: it cannot be read.
        """
        if isinstance(self.image, np.ndarray):
            return self.image
        if isinstance(self.image, bytes):
            return decode(self.image)
        return decode(read_file(self.image), upright=True)


class Source(Protocol):
    """Examples by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Dataset(Protocol):
    """A labelled dataset of one or more splits."""

    @property
    def split_names(self) -> Sequence[str]:
        """The names of its whole splits, such as "train" and "test"."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """The names of the classes, by label."""
        ...

    def split(self, expression: str) -> Source:
        """Returns the examples of "train", "train[:98%]", and so on.

        Raises:
          DatasetError: the expression is malformed, names a split that does not exist,
            or selects nothing.
        """
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
      DatasetError: there is no such dataset, or it cannot be read.
    """
    # These modules import this one.
    from mixer_jax.data.folders import open_folder, open_table
    from mixer_jax.data.listed import open_digits
    from mixer_jax.data.tfds import TfdsDataset

    if name == "digits":
        return open_digits()
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return open_folder(path)
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        return open_table(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise DatasetError(
            f"There is no folder or .csv/.tsv file {name!r}. Expected a folder with "
            "train/<class>/<image> and test/<class>/<image>."
        )
    return TfdsDataset(name, data_dir, manual_dir, label_key)


def default_splits(name: str) -> tuple[str, str]:
    """Returns the split expressions (train, test) that are usual for a dataset."""
    return DEFAULT_SPLITS.get(name.split(":")[0], ("train", "test"))


def first_of_each_class(source: Source, num_classes: int, count: int) -> Source:
    """Returns the first `count` examples of each class, or all of a smaller class.

    If the labels are not in memory, examples are read until every class has `count`.

    Raises:
      DatasetError: a class has no example, or an image has several labels.
    """
    labels = getattr(source, "labels", None)
    missing, indices = dict.fromkeys(range(num_classes), count), []
    for i in range(len(source)):
        label = source[i].label if labels is None else int(labels[i])
        if isinstance(label, tuple):
            raise DatasetError(
                f"{source[i].name} has the labels {label}; expected one label for each "
                "image. Use another label_key or dataset."
            )
        if missing.get(label, 0):
            missing[label] -= 1
            indices.append(i)
            if not any(missing.values()):
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
