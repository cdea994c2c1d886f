"""Image files in folders named after their classes, or listed in a table."""

import csv
import logging
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Mapping

import numpy as np

from mixer_jax.data.dataset import DatasetError
from mixer_jax.data.listed import FileSource, ListedDataset

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")

# Names of splits that are not taken for classes.
_SPLIT_NAMES = {"train", "training", "test", "testing", "val", "valid", "validation"}


def open_folder(root: pathlib.Path) -> ListedDataset:
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


def open_table(path: pathlib.Path) -> ListedDataset:
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
) -> ListedDataset:
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
    return ListedDataset(
        name,
        class_names,
        {
            split: FileSource(
                [path for path, _ in files],
                np.array([index[class_name] for _, class_name in files]),
            )
            for split, files in rows.items()
        },
    )
