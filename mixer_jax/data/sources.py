"""Datasets as random-access examples: digits, image files, TensorFlow Datasets.

`open_dataset` finds out which of them a name means; `Dataset.split` then gives the
examples of a split expression such as "train[:98%]".
"""

import csv
import dataclasses
import difflib
import importlib.util
import logging
import os
import pathlib
import re
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from mixer_jax.data.preprocess import ImageError, decode

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")

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
    """
    if name == "digits":
        return _open_digits()
    path = pathlib.Path(name).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if path.is_file() and path.suffix.lower() in (".csv", ".tsv"):
        return _open_table(path)
    if path.is_absolute() or name.startswith((".", "~")):
        raise DatasetError(
            f"There is no folder or .csv/.tsv file {name!r}. Expected a folder with "
            "train/<class>/<image> and test/<class>/<image>."
        )
    return _TfdsDataset(name, data_dir, manual_dir, label_key)


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


# --- Datasets whose examples are listed in memory: digits, folders, tables ---


@dataclasses.dataclass(frozen=True)
class _ArraySource:
    """Images that are in memory."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Example:
        return Example(self.images[index], int(self.labels[index]), f"example {index}")

    def take(self, indices: np.ndarray) -> "_ArraySource":
        return _ArraySource(self.images[indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class _FileSource:
    """Images in files, to be read by who needs them."""

    paths: Sequence[str]
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int, /) -> Example:
        path = self.paths[index]
        return Example(pathlib.Path(path), int(self.labels[index]), path)

    def take(self, indices: np.ndarray) -> "_FileSource":
        return _FileSource([self.paths[i] for i in indices], self.labels[indices])


@dataclasses.dataclass(frozen=True)
class _ListedDataset:
    """Splits whose examples are all listed."""

    name: str
    class_names: Sequence[str]
    splits: Mapping[str, _ArraySource | _FileSource]

    @property
    def split_names(self) -> Sequence[str]:
        return list(self.splits)

    def split(self, expression: str) -> Source:
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


def _open_digits() -> _ListedDataset:
    """scikit-learn's 1,797 handwritten digits, every fifth of a class for testing."""
    from sklearn.datasets import load_digits  # takes a second to import

    data = load_digits()
    levels = np.rint(data.images * (255 / 16)).astype(np.uint8)
    images = np.repeat(levels[..., None], 3, axis=-1)  # grey as RGB, [1797, 8, 8, 3]
    labels = data.target.astype(np.int64)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[::5]] = True
    return _ListedDataset(
        "digits",
        [str(name) for name in data.target_names],
        {
            "train": _ArraySource(images[~is_test], labels[~is_test]),
            "test": _ArraySource(images[is_test], labels[is_test]),
        },
    )


# Names of splits that are not taken for classes.
_SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


def _open_folder(root: pathlib.Path) -> _ListedDataset:
    """A folder {train,test,…}/<class>/…/<image>, or <class>/…/<image> as "train".

    All splits share one list of classes: the sorted names of all class folders.
    """
    split_dirs = {path.name: path for path in _subfolders(root)}
    if "train" not in split_dirs:
        if split_dirs and {name.lower() for name in split_dirs} <= _SPLIT_NAMES:
            raise DatasetError(
                f"{root} has the folders {', '.join(split_dirs)}, but no train. Rename "
                "the one to train on to train, in small letters."
            )
        split_dirs = {"train": root}
    rows: dict[str, list[tuple[str, str]]] = {}
    all_classes: set[str] = set()
    ignored: Counter[str] = Counter()
    for split, split_dir in split_dirs.items():
        loose = [path for path in split_dir.iterdir() if _is_image(path.name)]
        if loose:
            logger.warning(
                "%s: left out %d images that are in no class's folder, such as %s",
                split_dir,
                len(loose),
                loose[0].name,
            )
        classes = _subfolders(split_dir)
        files = [
            (file, class_dir.name)
            for class_dir in classes
            for file in _files_below(class_dir)
        ]
        ignored.update(
            pathlib.Path(file).suffix.lower()
            for file, _ in files
            if not _is_image(file)
        )
        rows[split] = [row for row in files if _is_image(row[0])]
        if rows[split]:
            all_classes.update(class_dir.name for class_dir in classes)
    if ignored:
        logger.warning(
            "%s: ignored %d files that are not %s (%s)",
            root,
            ignored.total(),
            " ".join(IMAGE_ENDINGS),
            ", ".join(
                f"{n} {ending or 'without ending'}" for ending, n in ignored.items()
            ),
        )
    return _list_files(str(root), rows, sorted(all_classes))


def _files_below(folder: pathlib.Path) -> Iterator[str]:
    """All files that are not hidden, in a fixed order."""
    for where, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = sorted(d for d in subfolders if not d.startswith("."))
        yield from (os.path.join(where, f) for f in sorted(files) if f[0] != ".")


def _is_image(file: str) -> bool:
    name = os.path.basename(file)
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")


def _subfolders(folder: pathlib.Path) -> list[pathlib.Path]:
    return sorted(
        path for path in folder.iterdir() if path.is_dir() and path.name[0] != "."
    )


def _open_table(path: pathlib.Path) -> _ListedDataset:
    """A CSV or TSV with a header: path, label and, if there are several, split."""
    rows: dict[str, list[tuple[str, str]]] = {}
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        try:
            columns = reader.fieldnames or []
            if not {"path", "label"} <= set(columns):
                raise DatasetError(
                    f"{path}: the first line is {columns}. Expected a header with the "
                    "columns path and label, and optionally split, separated by "
                    f"{delimiter!r}."
                )
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                if not row["path"] or not row["label"]:
                    raise DatasetError(
                        f"{where}: found {row}. Expected a path and a label."
                    )
                split = row.get("split") or "train"
                image = os.path.join(path.parent, row["path"])
                # Looking for every file may take long; the first one shows where the
                # paths start. One that is missing later is an unreadable image.
                if split not in rows and not os.path.isfile(image):
                    raise DatasetError(
                        f"{where}: there is no file {image}. Paths are relative to the "
                        "table's folder."
                    )
                rows.setdefault(split, []).append((image, row["label"]))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DatasetError(f"{path} is no UTF-8 table: {error}.") from error
    if not rows:
        raise DatasetError(f"{path}: no lines below the header.")
    classes = {label for split in rows.values() for _, label in split}
    return _list_files(str(path), rows, sorted(classes))


def _list_files(
    name: str, rows: Mapping[str, list[tuple[str, str]]], class_names: list[str]
) -> _ListedDataset:
    """Turns rows (path, class name) into sources, and says which classes are odd."""
    empty = [split for split, files in rows.items() if not files]
    if "train" in empty or empty == list(rows):
        raise DatasetError(
            f"{name}: no images in {', '.join(empty)}. Expected "
            f"<split>/<class>/<image> with images ending in {' '.join(IMAGE_ENDINGS)}, "
            "in any letter case."
        )
    if empty:
        logger.warning("%s: no images in %s; left out", name, ", ".join(empty))
        rows = {split: files for split, files in rows.items() if files}
    index = {class_name: i for i, class_name in enumerate(class_names)}
    for split, files in rows.items():
        missing = sorted(set(class_names) - {class_name for _, class_name in files})
        if missing:
            logger.warning(
                "%s: %d of %d classes have no image in %s: %s",
                name,
                len(missing),
                len(class_names),
                split,
                ", ".join(missing[:10]) + (", …" if len(missing) > 10 else ""),
            )
    return _ListedDataset(
        name,
        class_names,
        {
            split: _FileSource(
                [path for path, _ in files],
                np.array([index[class_name] for _, class_name in files]),
            )
            for split, files in rows.items()
        },
    )


# --- TensorFlow Datasets ---


@dataclasses.dataclass(frozen=True)
class _TfdsSource:
    """Examples of a TFDS data source, images still encoded."""

    name: str
    records: Sequence[Mapping]
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Example:
        record = self.records[index]
        label = record[self.label_key]
        return Example(
            record[self.image_key],
            int(label) if np.ndim(label) == 0 else tuple(int(x) for x in label),
            f"{self.name}, example {index}",
        )


class _TfdsDataset:
    """Any image classification dataset of TensorFlow Datasets.

    TensorFlow is needed to download and prepare one, once; reading needs none.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | None,
        manual_dir: str | None,
        label_key: str | None,
    ):
        import tensorflow_datasets as tfds  # half a second, and only here

        self.name = name
        self._tfds = tfds
        try:
            self._builder = tfds.builder(
                name, data_dir=data_dir, file_format="array_record"
            )
        except tfds.core.DatasetNotFoundError as error:
            known = tfds.list_builders(with_community_datasets=False)
            raise DatasetError(_unknown_dataset(name, known)) from error
        except ImportError as error:
            raise DatasetError(_needs_tensorflow(name, data_dir)) from error
        if not self._builder.is_prepared():
            if importlib.util.find_spec("tensorflow") is None:
                raise DatasetError(_needs_tensorflow(name, self._builder.data_dir))
            self._prepare(manual_dir)
        self._image_key, self._label_key = self._find_keys(label_key)

    def _prepare(self, manual_dir: str | None) -> None:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # leave the memory to JAX
        tf.config.set_visible_devices([], "TPU")
        logger.info("preparing %s in %s, once", self.name, self._builder.data_dir)
        self._builder.download_and_prepare(
            download_config=self._tfds.download.DownloadConfig(manual_dir=manual_dir)
        )

    def _find_keys(self, label_key: str | None) -> tuple[str, str]:
        """Names the image and label features: the supervised pair, or the only two."""
        info, features = self._builder.info, self._tfds.features
        images = [k for k, v in info.features.items() if isinstance(v, features.Image)]
        labels = [k for k, v in info.features.items() if hasattr(_scalar(v), "names")]
        image, label = info.supervised_keys or (*images[:1], *labels[:1], "", "")[:2]
        label = label_key or label
        if image not in images or label not in labels:
            raise DatasetError(
                f"{self.name} has no image with a class {label_key or ''}: its "
                f"features are {dict(info.features.items())}."
            )
        return image, label

    @property
    def split_names(self) -> Sequence[str]:
        return list(self._builder.info.splits)

    @property
    def class_names(self) -> Sequence[str]:
        return _scalar(self._builder.info.features[self._label_key]).names

    def split(self, expression: str) -> Source:
        decoders = {self._image_key: self._tfds.decode.SkipDecoding()}
        try:
            records = self._builder.as_data_source(expression, decoders=decoders)
        except NotImplementedError as error:
            raise DatasetError(
                f"{self.name} in {self._builder.data_dir} is stored as "
                f"{self._builder.info.file_format.value}, which cannot be read in "
                "random order. Prepare it as array_record in another tfds_data_dir, or "
                "convert it with `tfds convert_format --dataset_dir="
                f"{self._builder.data_dir} --out_file_format=array_record "
                "--out_path=<new folder>`."
            ) from error
        except ValueError as error:
            raise DatasetError(f"{self.name}, split {expression!r}: {error}") from error
        return _TfdsSource(
            f"{self.name} {expression}", records, self._image_key, self._label_key
        )


def _scalar(feature: Any) -> Any:
    """The feature of which `feature` is a sequence, if it is one."""
    return getattr(feature, "feature", feature)


def _unknown_dataset(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.split(":")[0], known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return (
        f"There is no dataset {name!r}: neither a folder or .csv/.tsv file of that "
        f"name nor a dataset of TensorFlow Datasets.{hint}"
    )


def _needs_tensorflow(name: str, folder: object) -> str:
    where = f"in {folder}" if folder else "in ~/tensorflow_datasets"
    return (
        f"{name} is not prepared {where}, and preparing it takes TensorFlow, once. "
        'Install it with `pip install -e ".[tfds]"` and start again, or set '
        "--config.tfds_data_dir to where the dataset is prepared as array_record."
    )
