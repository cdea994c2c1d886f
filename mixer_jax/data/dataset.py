"""Datasets as random-access examples.

`open_dataset` finds out what a name means; `Dataset.split` then gives the examples of a
split expression such as "train[:98%]".
"""

import dataclasses
import pathlib
import time
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from mixer_jax.data.decode import ImageError, decode

# What a run trains and evaluates on unless told otherwise; all else is "train", "test".
# vit_jax keeps the last 2 % of CIFAR and 1 % of ImageNet out of training.
DEFAULT_SPLITS = {
    "cifar10": ("train[:98%]", "test"),
    "cifar100": ("train[:98%]", "test"),
    "imagenet2012": ("train[:99%]", "validation"),
}


class DatasetError(ValueError):
    """A dataset that is not there or not as it should be."""


class Example(NamedTuple):
    """One labelled image.

    Attributes:
      image: uint8 [height, width, 3]; or a file's encoded contents; or its path.
      label: index into the dataset's class names, -1 if TFDS has none; a tuple of them
        in a dataset whose images have several.
      name: what to call the example in a message.
    """

    image: np.ndarray | bytes | pathlib.Path
    label: int | tuple[int, ...]
    name: str

    def pixels(self) -> np.ndarray:
        """Returns the image as uint8 [height, width, 3].

        A user's file is turned upright as its EXIF orientation says, since that is how
        photographs are looked at; TensorFlow Datasets' images are taken as they are
        stored, as the original program does.

        Raises:
          ImageError: it cannot be read.
        """
        if isinstance(self.image, np.ndarray):
            return self.image
        if isinstance(self.image, bytes):
            return decode(self.image)
        return decode(_read(self.image), upright=True)


# What trying again does not mend; other errors may be those of a network disk.
_LASTING = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)


def _read(path: pathlib.Path) -> bytes:
    """Returns a file's contents, at the third attempt at the latest."""
    for secs in (1, 5):
        try:
            return path.read_bytes()
        except _LASTING as error:
            raise ImageError(error.strerror or str(error)) from error
        except OSError:
            time.sleep(secs)
    try:
        return path.read_bytes()
    except OSError as error:
        raise ImageError(error.strerror or str(error)) from error


class Source(Protocol):
    """Examples by position."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Example: ...


class Dataset(Protocol):
    """A labelled dataset of one or more splits."""

    @property
    def split_names(self) -> Sequence[str]:
        """Its whole splits, such as "train" and "test"."""
        ...

    @property
    def class_names(self) -> Sequence[str]:
        """What the labels 0, 1, … stand for."""
        ...

    def split(self, expression: str) -> Source:
        """Returns the examples of "train", "train[:98%]", and so on.

        Raises:
          DatasetError: the expression is malformed, names a split that is not there,
            or leaves nothing.
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
      manual_dir: where it finds files that one must download by hand.
      label_key: which of a TensorFlow dataset's features is the label, if not the usual
        one; "real_label" of imagenet2012_real, for one, of which an image has several.

    Raises:
      DatasetError: there is no such dataset, or it cannot be read.
    # These modules import this one.
    from mixer_jax.data.folders import open_folder, open_table
    from mixer_jax.data.listed import open_digits
    from mixer_jax.data.tfds import TfdsDataset

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


def first_of_each_class(source: Source, num_classes: int, count: int) -> Source:
    """Returns the first `count` examples of each class, or all of a smaller class.

    Where the labels are not in memory, examples are read until the classes are full.

    Raises:
      DatasetError: a class has no example.
    """
    labels = getattr(source, "labels", None)
    wanted, indices = dict.fromkeys(range(num_classes), count), []
    for i in range(len(source)):
        label = source[i].label if labels is None else int(labels[i])
        assert isinstance(label, int), "one label for each image"
        if wanted.get(label, 0):
            wanted[label] -= 1
            indices.append(i)
            if not any(wanted.values()):
                break
    empty = [label for label, left in wanted.items() if left == count]
    if empty:
        raise DatasetError(
            f"{len(empty)} of {num_classes} classes have no example to learn from, the "
            f"first of them class {empty[0]}."
        )
    return _Subset(source, indices)


@dataclasses.dataclass(frozen=True)
class _Subset:
    """Some examples of a source."""

    source: Source
    indices: Sequence[int]

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int, /) -> Example:
        return self.source[self.indices[index]]


def default_splits(name: str) -> tuple[str, str]:
    """Returns the split expressions (train, test) that are usual for a dataset."""
    return DEFAULT_SPLITS.get(name.split(":")[0], ("train", "test"))
