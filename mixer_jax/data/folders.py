"""Image files: in folders named after their classes, listed in a table, or found."""

import csv
import glob
import logging
import os
import pathlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from mixer_jax.data.dataset import DatasetError
from mixer_jax.data.listed import ListedDataset, ListedSource

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")

# Folders of these names, in any letter case, are splits and not classes.
SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


def open_folder(root: pathlib.Path) -> ListedDataset:
    """Opens a folder of <split>/<class>/…/<image>, or of <class>/…/<image>.

    Without a folder called train, all images are the split "train". All splits share
    one list of classes: the sorted names of all class folders.

    Raises:
      DatasetError: there are no images to train on.
    """
    splits = _subfolders(root)
    if "train" not in splits:
        if splits and {name.lower() for name in splits} <= SPLIT_NAMES:
            raise DatasetError(
                f"{root} has the folders {', '.join(splits)}, but no train. Rename "
                "the one to train on to train, in small letters."
            )
        splits = {"train": root}
    rows: dict[str, list[tuple[str, str]]] = {}
    class_names: set[str] = set()
    ignored: Counter[str] = Counter()
    for split, folder in splits.items():
        classes = _subfolders(folder)
        files = [(x, name) for name in classes for x in walk_files(classes[name])]
        rows[split] = [row for row in files if is_image(row[0])]
        if rows[split]:
            class_names.update(classes)
        ignored.update(
            pathlib.Path(x).suffix.lower() for x, _ in files if not is_image(x)
        )
        loose = [name for name in os.listdir(folder) if is_image(name)]
        if loose:
            logger.warning(
                "%s: left out %d images that are not in a class folder, such as %s",
                folder,
                len(loose),
                loose[0],
            )
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
    return _list_files(str(root), rows, sorted(class_names))


def open_table(path: pathlib.Path) -> ListedDataset:
    """Opens a CSV or TSV file with the columns path, label and, if wanted, split.

    Raises:
      DatasetError: it is not such a table, or has no images to train on.
    """
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
                # To look for every file may take long. The first of each split shows
                # whether the paths are right; one that is missing later is reported
                # as an unreadable image.
                if split not in rows and not os.path.isfile(image):
                    raise DatasetError(
                        f"{where}: there is no file {image}. Paths are relative to the "
                        "table's folder."
                    )
                rows.setdefault(split, []).append((image, row["label"]))
        except (UnicodeDecodeError, csv.Error) as error:
            raise DatasetError(f"{path} is not a UTF-8 table: {error}.") from error
    if not rows:
        raise DatasetError(f"{path}: no lines below the header.")
    classes = {label for split in rows.values() for _, label in split}
    return _list_files(str(path), rows, sorted(classes))


def find_images(patterns: Iterable[str]) -> list[str]:
    """Returns the image files that paths, folders and globs stand for, each once.

    Args:
      patterns: each a file, whatever its ending; a folder, for the images in it and
        below; or a glob such as "photos/**/*.jpg", for the images and folders that it
        matches.

    Raises:
      FileNotFoundError: a pattern stands for no image; it is named.
    """
    found: dict[str, None] = {}
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if os.path.isfile(path):
            images = [path]
        else:
            matches = [path] if os.path.isdir(path) else glob.glob(path, recursive=True)
            images = []
            for match in sorted(matches):
                files = walk_files(match) if os.path.isdir(match) else [match]
                images += sorted(filter(is_image, files))
        if not images:
            raise FileNotFoundError(
                f"{pattern}: no such file, nor a folder or glob with images, which end "
                f"in {' '.join(IMAGE_ENDINGS)}."
            )
        found |= dict.fromkeys(str(pathlib.Path(image)) for image in images)
    return list(found)


def walk_files(folder: str | os.PathLike[str]) -> Iterator[str]:
    """Gives the paths of all files in a folder and below it, in a fixed order.

    The files of a folder come before those of its subfolders. Hidden files and folders,
    such as ._photo.jpg and .ipynb_checkpoints, are left out. Links are followed.
    """
    for where, subfolders, files in os.walk(folder, followlinks=True):
        subfolders[:] = _visible(subfolders)
        yield from (os.path.join(where, name) for name in _visible(files))


def is_image(file: str) -> bool:
    """Returns whether a path is one of an image, by its ending, and not hidden."""
    name = os.path.basename(file)
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")


def _visible(names: Iterable[str]) -> list[str]:
    return sorted(name for name in names if not name.startswith("."))


def _subfolders(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the folders in `folder` by name, without hidden ones."""
    names = _visible(os.listdir(folder))
    return {name: folder / name for name in names if (folder / name).is_dir()}


def _list_files(
    name: str, rows: Mapping[str, list[tuple[str, str]]], class_names: list[str]
) -> ListedDataset:
    """Turns rows (path, class name) into a dataset; warns of classes without images."""
    empty = [split for split, files in rows.items() if not files]
    if "train" in empty or empty == list(rows):
        raise DatasetError(
            f"{name}: no images in {', '.join(empty)}. Expected "
            f"<split>/<class>/<image> with images ending in {' '.join(IMAGE_ENDINGS)}, "
            "in any letter case."
        )
    if empty:
        logger.warning("%s: no images in %s; left out", name, ", ".join(empty))
    index = {class_name: i for i, class_name in enumerate(class_names)}
    splits = {}
    for split, files in rows.items():
        if not files:
            continue
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
        splits[split] = ListedSource(
            np.array([path for path, _ in files], object),
            np.array([index[class_name] for _, class_name in files]),
        )
    return ListedDataset(name, class_names, splits)
