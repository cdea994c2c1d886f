"""Datasets of image files in folders that are named after their classes."""

import logging
import os
import pathlib
from collections import Counter

from mixer_jax.data.dataset import DatasetError
from mixer_jax.data.listed import ListedDataset, Rows, list_files, read_classes
from mixer_jax.data.names import (
    clean_classes,
    clean_name,
    find_split,
    listing,
    printable,
    split_kinds,
)
from mixer_jax.data.walk import IMAGE_ENDINGS, File, Folder, each_once, is_image, scan

logger = logging.getLogger(__name__)

EXPECTED = "Expected <split>/<class>/<image> or <class>/<image>"


def open_folder(root: pathlib.Path) -> ListedDataset:
    """Opens a folder of <split>/<class>/…/<image>, or of <class>/…/<image>.

    Without a folder for training, all images are the split "train". All splits share
    one list of classes: the sorted names of all class folders, or the lines of a
    classes.txt. Whatever is not taken for what its name says is told.

    Raises:
      DatasetError: there are no images to train on, or it is not certain which folders
        are splits and which are classes.
    """
    where = printable(root)
    folder = scan(root)
    if not folder.num_images:
        raise DatasetError(_without_images(folder))
    tables = [x.path for x in folder.files if x.path.lower().endswith((".csv", ".tsv"))]
    if tables:
        logger.warning(
            "%s holds a table, which is not read: to use it, name it in place of the "
            "folder: %s",
            where,
            printable(listing(tables, 3)),
        )
    folder = _unwrapped(folder)
    splits = _find_splits(folder)
    found = sorted({name for x in splits.values() for name in x.classes})
    clean = clean_classes(where, found)
    rows: dict[str, Rows] = {}
    ignored: Counter[str] = Counter()
    kept: dict[str, list[File]] = {}
    for split, members in splits.items():
        _refuse_other_levels(members, set(found))
        _warn_of_common_folders(members)
        files = [
            (x, clean[name]) for name, c in members.classes.items() for x in c.walk()
        ]
        ignored.update(
            pathlib.Path(x.path).suffix.lower()
            for x, _ in files
            if not is_image(x.path)
        )
        images = [(x, name) for x, name in files if is_image(x.path)]
        images = each_once(f"{where}, {split}" if len(splits) > 1 else where, images)
        rows[split] = [(file.path, name) for file, name in images]
        kept[split] = [file for file, _ in images]
        _warn_of_loose_images(members)
    empty = {
        name: x
        for members in splits.values()
        for name, x in members.folders.items()
        if name not in clean
    }
    if empty:
        logger.warning(
            "%s: %d folders in the place of a class have no images; left out: %s",
            where,
            len(empty),
            printable(
                listing(
                    [f"{name} ({_endings(x)})" for name, x in sorted(empty.items())]
                )
            ),
        )
    if folder not in splits.values():
        _warn_of_loose_images(folder)
    _warn_of_shared_files(where, kept)
    if ignored:
        logger.warning(
            "%s: ignored %d files that are not %s (%s)",
            where,
            ignored.total(),
            " ".join(IMAGE_ENDINGS),
            _count(ignored),
        )
    classes = read_classes(root) or read_classes(pathlib.Path(folder.path))
    return list_files(where, folder.path, rows, classes)


def _unwrapped(folder: Folder, classes: set[str] | None = None) -> Folder:
    """Returns the folder below one or several that hold nothing but one folder.

    Args:
      folder: perhaps such a folder; a dataset's, or a split's.
      classes: of a split, the names of known classes; a folder of such a name is one.
    """
    while len(folder.classes) == 1 and not folder.images:
        ((name, inner),) = folder.classes.items()
        if classes is None:  # a dataset with one split: train/<class>
            stop = bool(split_kinds([name])) and not split_kinds(inner.classes)
        else:
            stop = clean_name(name) in classes
        if stop or inner.images:
            break
        logger.warning(
            "%s holds images in the folder %s alone; that is taken for the dataset or "
            "split, and its folders %s for what is in it",
            printable(folder.path),
            printable(name),
            printable(listing(list(inner.classes))),
        )
        folder = inner
    return folder


def _find_splits(folder: Folder) -> dict[str, Folder]:
    """Returns the folders that are splits, by name; {"train": folder} if none are."""
    where, inside = printable(folder.path), folder.classes
    kinds = split_kinds(inside)
    with_classes = [name for name, x in inside.items() if x.classes]
    training = [x for x in with_classes if kinds.get(x) == "train"]
    if not inside:
        above = os.path.dirname(os.path.abspath(folder.path))
        raise DatasetError(
            f"{where}: its {folder.num_images} images are not in class folders. "
            f"{EXPECTED}. If this folder is one class, the dataset may be the folder "
            f"above: {printable(above)}."
        )
    if not training:
        if set(kinds) == set(inside):
            raise DatasetError(
                f"{where} has the folders {printable(', '.join(inside))}, but no train "
                "that holds folders of classes. Rename the one to train on to train, "
                "and put its images into a folder for each class, or list them in a "
                "table with the columns path and label."
            )
        if kinds:
            logger.warning(
                "%s: taken for classes and not for splits: %s; no folder to train on "
                "holds folders of classes",
                where,
                printable(listing(list(kinds))),
            )
        return {"train": folder}
    train = find_split("train", with_classes)
    if train is None:
        raise DatasetError(
            f"{where}: the folders {printable(' and '.join(training))} could be the "
            "one to train on. Rename that one to train."
        )
    splits = {train: _unwrapped(inside[train], set())}
    classes = {clean_name(name) for name in splits[train].classes}
    for name, other in folder.folders.items():
        if name == train:
            continue
        members = _unwrapped(other, classes)
        found = {clean_name(name) for name in members.classes}
        if found & classes:
            splits[name] = members
            continue
        shown = printable(listing(sorted(found)))
        logger.warning(
            "%s: %s; left out",
            where,
            f"no images in {printable(name)}"
            if not other.num_images
            else f"{printable(name)} is no split: none of its folders ({shown}) is a "
            f"class of {printable(train)} ({printable(listing(sorted(classes)))})"
            if found
            else f"{printable(name)} is no split: its images are not in class folders",
        )
    if find_split("train", list(splits)) is None:  # pets_train, without its pets_test
        splits["train"] = splits.pop(train)
    usual = {find_split(x, list(splits)): x for x in ("train", "test", "validation")}
    taken = {name: usual.get(name, "another split") for name in splits}
    if any(x not in (name, "validation") for name, x in taken.items()):
        shown = ", ".join(f"{name} is taken for {x}" for name, x in taken.items())
        logger.warning("%s: %s", where, printable(shown))
    return dict(sorted(splits.items()))


def _refuse_other_levels(split: Folder, classes: set[str]) -> None:
    """Raises DatasetError if a class holds what should be beside or above it."""
    for name, folder in split.classes.items():
        others = sorted((set(folder.classes) & classes) - {name})
        where = printable(folder.path)
        if others:
            raise DatasetError(
                f"{where} is beside the classes {printable(listing(others))} and holds "
                f"folders of these names. {EXPECTED}. Move the folder away, or what is "
                "in it into the classes that it belongs to."
            )
        if len(set(split_kinds(folder.classes).values())) > 1:
            raise DatasetError(
                f"{where} is in the place of a class and holds the splits "
                f"{printable(listing(list(folder.classes)))}. {EXPECTED}: the splits "
                "are above the classes. Move the folders, or list the images in a "
                "table with the columns path, label and split."
            )


def _warn_of_common_folders(split: Folder) -> None:
    """Warns if it is not certain at which level the classes are, as in fold1/cat."""
    counts = Counter(x for folder in split.classes.values() for x in folder.classes)
    common = [name for name, count in counts.items() if count > 1]
    if len(common) > 1:
        logger.warning(
            "%s: the folders %s are taken for classes, and several hold folders of the "
            "same names: %s. If these are the classes, move the images into one "
            "folder for each, or list them in a table with the columns path and label.",
            printable(split.path),
            printable(listing(list(split.classes))),
            printable(listing(common)),
        )


def _warn_of_loose_images(folder: Folder) -> None:
    if loose := folder.images:
        logger.warning(
            "%s: left out %d images that are not in a class folder, such as %s",
            printable(folder.path),
            len(loose),
            printable(os.path.basename(loose[0].path)),
        )


def _warn_of_shared_files(where: str, splits: dict[str, list[File]]) -> None:
    """Warns of files that links put into several splits."""
    if not any(file.linked for files in splits.values() for file in files):
        return
    real_files = {split: {x.real for x in files} for split, files in splits.items()}
    names = list(real_files)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            if shared := len(real_files[first] & real_files[second]):
                logger.warning(
                    "%s: %d images are in %s and, by links, in %s; do not test on "
                    "training images",
                    where,
                    shared,
                    printable(first),
                    printable(second),
                )


def _without_images(folder: Folder) -> str:
    """Says what is in a folder that has no images."""
    where = pathlib.Path(folder.path)
    prepared = [*where.glob("dataset_info.json"), *where.glob("*/dataset_info.json")]
    if prepared or [*where.glob("*/*/dataset_info.json")]:
        return (
            f"{printable(where)} is a folder that TensorFlow Datasets has prepared. "
            "Give the name of the dataset, such as cifar10, and the folder above it as "
            "--config.tfds_data_dir or --tfds-data-dir."
        )
    names = ", ".join(folder.folders)
    return printable(
        f"{where}: no images in {names or 'it'}; found {_endings(folder)}. {EXPECTED}, "
        f"with images ending in {' '.join(IMAGE_ENDINGS)}, in any letter case."
    )


def _endings(folder: Folder) -> str:
    """Says how many files of which endings are in a folder and below it."""
    return _count(Counter(pathlib.Path(x.path).suffix.lower() for x in folder.walk()))


def _count(endings: Counter[str]) -> str:
    found = [f"{n} {ending or 'without ending'}" for ending, n in endings.most_common()]
    return printable(listing(found)) or "no files"
