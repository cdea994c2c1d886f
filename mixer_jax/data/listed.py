"""Datasets that list all their examples in memory, and scikit-learn's digits."""

import dataclasses
import difflib
import functools
import importlib.util
import logging
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import einops
import numpy as np

from mixer_jax.data.dataset import DatasetError, Example, Part
from mixer_jax.data.decode import ImageError, open_image
from mixer_jax.data.names import clean_name, listing, printable
from mixer_jax.data.splits import parse_split

logger = logging.getLogger(__name__)

Labels = str | tuple[str, ...]  # the class of an image, or its classes
Rows = list[tuple[str, Labels]]  # paths of images and their classes

MISSING = b"-1"  # in place of a size

SAMPLES = 1000  # files at most that a fingerprint looks into


@dataclasses.dataclass(frozen=True)
class ListedSource:
    """Images in memory, or the paths of image files, with their labels.

    Attributes:
      images: uint8 [n, height, width, 3]; or an array of n strings, each a path.
      labels: int [n]; or an array of n tuples, if images have several labels.
    """

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int, /) -> Example:
        image, label = self.images[index], self.labels[index]
        label = label if isinstance(label, tuple) else int(label)
        if isinstance(image, str):
            return Example(pathlib.Path(image), label, printable(image))
        return Example(image, label, f"example {index}")

    @functools.cached_property
    def stratified_order(self) -> np.ndarray:
        """A random order in which the examples of each class are evenly spread.

        Any slice of it has nearly the same share of each class as the whole. An image
        with several labels counts as one of the first. Int [n], always the same.
        """
        labels = self.labels
        if labels.dtype == object:
            labels = np.array([x[0] if x else -1 for x in labels])
        by_class = np.argsort(labels, kind="stable")
        starts = np.flatnonzero(np.diff(labels[by_class])) + 1
        rng = np.random.default_rng(0)
        position = np.empty(len(labels))
        for members in np.split(by_class, starts):
            members = rng.permutation(members)
            position[members] = (np.arange(len(members)) + rng.random()) / len(members)
        return np.argsort(position, kind="stable")

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
      root: the folder that paths are relative to in a fingerprint.
      missing: paths of files that were not there, or that this user may not read, when
        `columns` looked for them.
    """

    name: str
    class_names: Sequence[str]
    splits: Mapping[str, ListedSource]
    root: str = ""
    missing: set[str] = dataclasses.field(default_factory=set)

    @property
    def split_names(self) -> Sequence[str]:
        """See Dataset."""
        return list(self.splits)

    def parts(self, expression: str) -> list[Part]:
        """See Dataset."""
        sizes = {name: len(source) for name, source in self.splits.items()}
        return parse_split(self.name, sizes, expression)

    def split(self, expression: str) -> ListedSource:
        """See Dataset."""
        sources = []
        for part in self.parts(expression):
            source = self.splits[part.split]
            if (part.start, part.stop) != (0, len(source)):
                source = source.take(source.stratified_order[part.start : part.stop])
            sources.append(source)
        if len(sources) == 1:
            return sources[0]
        return ListedSource(
            np.concatenate([source.images for source in sources]),
            np.concatenate([source.labels for source in sources]),
        )

    def columns(self, expression: str) -> dict[str, Iterator[bytes]]:
        """See Dataset."""
        source = self.split(expression)
        labels = (str(x).encode() for x in source.labels.tolist())
        if source.images.dtype != object:
            images = source.images
            about = (str(images.shape).encode(), images.tobytes())
            return {"images": iter(about), "labels": labels}
        root = os.path.join(os.path.abspath(self.root), "")
        step = len(source) // SAMPLES + 1
        paths = (os.path.abspath(x).removeprefix(root) for x in source.images)
        names = (clean_name(x).encode() for x in paths)
        return {
            "names": names,
            "labels": labels,
            "sizes": self._sizes(source.images),
            "contents": _in_threads(_middle, source.images[::step]),
        }

    def _sizes(self, paths: np.ndarray) -> Iterator[bytes]:
        for path, size in zip(paths, _in_threads(_size, paths), strict=True):
            if size == MISSING:
                self.missing.add(str(path))
            yield size


def list_files(
    name: str, root: str, rows: Mapping[str, Rows], classes: Sequence[str] | None
) -> ListedDataset:
    """Turns rows into a dataset; warns of classes without images.

    Args:
      name: of the dataset.
      root: its folder.
      rows: the paths and classes of each split's images; at least one of each split.
      classes: all names in order, if they are given; else those of the rows, sorted.

    Raises:
      DatasetError: an image is of no known class.
    """
    counts = {split: Counter[str]() for split in rows}
    for split, files in rows.items():
        for _, label in files:
            counts[split].update([label] if isinstance(label, str) else label)
    found = sorted(set().union(*counts.values()))
    class_names = found if classes is None else list(classes)
    index = {class_name: i for i, class_name in enumerate(class_names)}
    if unknown := [x for x in found if x not in index]:
        close = difflib.get_close_matches(unknown[0], class_names, 3)
        raise DatasetError(
            f"{name}: {len(unknown)} classes are not in classes.txt: "
            f"{listing(unknown)}. Expected one of its {len(class_names)}"
            f"{f', such as {listing(close)}' if close else ''}. Add them to "
            "classes.txt, one name a line, or give it another name."
        )
    splits = {}
    for split, files in rows.items():
        if missing := [x for x in class_names if not counts[split][x]]:
            logger.warning(
                "%s: %d of %d classes have no image in %s: %s",
                name,
                len(missing),
                len(class_names),
                printable(split),
                listing(missing, 10),
            )
        labels = np.empty(len(files), object)
        for i, (_, label) in enumerate(files):
            if isinstance(label, str):
                labels[i] = index[label]
            else:
                labels[i] = tuple(index[x] for x in label)
        splits[printable(split)] = ListedSource(
            np.array([path for path, _ in files], object),
            labels if isinstance(labels[0], tuple) else labels.astype(np.int64),
        )
    return ListedDataset(name, class_names, splits, root)


def read_classes(folder: pathlib.Path) -> list[str] | None:
    """Reads all names of classes in order from <folder>/classes.txt, if it is there.

    Raises:
      DatasetError: it is not a UTF-8 text of different names, one a line.
    """
    path = folder / "classes.txt"
    if not path.is_file():
        return None
    where = printable(path)
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise DatasetError(
            f"{where} is not a UTF-8 text: {error}. Save it as UTF-8, one name a line."
        ) from error
    names = [clean_name(line) for line in lines if clean_name(line)]
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice or not names:
        wrong = f"{listing(twice)} twice" if twice else "no names"
        raise DatasetError(
            f"{where}: found {wrong}. Expected the name of each class once, one a line."
        )
    logger.warning("%s gives the %d classes and their order", where, len(names))
    return names


def open_digits() -> ListedDataset:
    """Opens scikit-learn's 1,797 handwritten digits.

    Every fifth image of each class is in the split "test", the others are in "train".
    """
    pixels, labels = _read_digits()
    grey = np.rint(pixels * (255 / 16)).astype(np.uint8)  # has 17 levels
    images = einops.repeat(grey, "n height width -> n height width rgb", rgb=3)
    is_test = np.zeros(len(labels), bool)
    for label in range(10):
        is_test[np.flatnonzero(labels == label)[::5]] = True
    return ListedDataset(
        "digits",
        [str(i) for i in range(10)],
        {
            "train": ListedSource(images[~is_test], labels[~is_test]),
            "test": ListedSource(images[is_test], labels[is_test]),
        },
    )


def _read_digits() -> tuple[np.ndarray, np.ndarray]:
    """Returns pixels from 0 to 16, [images, 8, 8], and labels, int64 [images].

    scikit-learn imports SciPy, a fifth of the seconds from the start of a run to its
    first step (mixer-jax benchmark --config configs/digits.py --parts start). So its
    file is read without it, as long as it is where it is now.
    """
    found = importlib.util.find_spec("sklearn")
    folder = pathlib.Path(found.origin).parent if found and found.origin else None
    path = folder and folder / "datasets" / "data" / "digits.csv.gz"
    if path and path.is_file():
        table = np.loadtxt(path, np.int64, delimiter=",")
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1]

    from sklearn.datasets import load_digits

    data = load_digits()
    return data.images, data.target.astype(np.int64)


def _size(path: str) -> bytes:
    """Returns the size of a file, MISSING if it is not there or may not be read."""
    try:
        if not os.access(path, os.R_OK):
            return MISSING
        return str(os.stat(path).st_size).encode()
    except OSError:
        return MISSING


def _middle(path: str) -> bytes:
    """Returns 4 kB from the middle of a file, where pixels are; b"" if there are none.

    The beginning may be the same in all files of a camera.
    """
    try:
        with open_image(path) as file:
            file.seek(max(os.fstat(file.fileno()).st_size // 2 - 2048, 0))
            return file.read(4096)
    except (OSError, ImageError):
        return b""


def _in_threads(fn: Callable[[str], bytes], paths: np.ndarray) -> Iterator[bytes]:
    """Gives fn(path) of each path, in order."""

    def call(start: int) -> list[bytes]:
        return [fn(path) for path in paths[start : start + 256]]

    # Threads, since a network disk may take a millisecond for each.
    with ThreadPoolExecutor(32) as pool:
        for chunk in pool.map(call, range(0, len(paths), 256)):
            yield from chunk
