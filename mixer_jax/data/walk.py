"""Finds image files in folders: one walk, for training and for prediction."""

import dataclasses
import glob
import logging
import os
import pathlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from mixer_jax.data.dataset import DatasetError
from mixer_jax.data.names import listing, printable

logger = logging.getLogger(__name__)

IMAGE_ENDINGS = (
    *(".jpg", ".jpeg", ".png", ".webp"),
    *(".bmp", ".gif", ".tif", ".tiff"),
)

# Folders that other programs make: of zip files by macOS, of thumbnails, of deleted
# files, of Python. Some hold images.
JUNK_FOLDERS = frozenset(
    (
        *("__macosx", "@eadir", "#recycle", "$recycle.bin", "lost+found"),
        *("system volume information", "__pycache__"),
    )
)


# A few links can make endless many folders out of one, and folders can lie in one
# another without end.
MAX_VISITS = 1000  # of one folder
MAX_DEPTH = 100


class File(NamedTuple):
    """A file as it was found.

    Attributes:
      path: by which it was found.
      folder: where the folder that it was found in is, after all links.
      target: if it is a link, where the file is, after all links.
      linked: whether a link leads to it, or to a folder that it was found in.
      inode: its number in the file system, the same for hard links.
    """

    path: str
    folder: str
    target: str | None
    linked: bool
    inode: int

    @property
    def real(self) -> str:
        """Where the file is, after all links."""
        return self.target or os.path.join(self.folder, os.path.basename(self.path))


@dataclasses.dataclass
class Folder:
    """A folder and what is below it.

    Attributes:
      path: by which it was found.
      files: the visible files in it, in the order of their names.
      folders: the visible folders in it by name, in that order.
      num_images: how many of the files in it and below it are images.
    """

    path: str
    files: list[File] = dataclasses.field(default_factory=list)
    folders: dict[str, "Folder"] = dataclasses.field(default_factory=dict)
    num_images: int = 0

    def walk(self) -> Iterator[File]:
        """Gives the files in the folder, and then those of each folder in it."""
        yield from self.files
        for folder in self.folders.values():
            yield from folder.walk()

    @property
    def images(self) -> list[File]:
        """The images that are in the folder itself."""
        return [file for file in self.files if is_image(file.path)]

    @property
    def classes(self) -> dict[str, "Folder"]:
        """The folders in it with images in them or below them, by name."""
        return {name: x for name, x in self.folders.items() if x.num_images}


def scan(path: str | os.PathLike[str]) -> Folder:
    """Lists a folder and all that is below it, in a fixed order; warns of what it left.

    Links are followed, but not to a folder that the link itself is in, which would list
    everything again. Hidden files and folders, such as ._photo.jpg and
    .ipynb_checkpoints, and JUNK_FOLDERS are left out.

    Raises:
      DatasetError: a folder cannot be listed, links lead to it more than MAX_VISITS
        times, or more than MAX_DEPTH folders lie in one another.
    """
    visits = Counter[str]()
    upwards: list[str] = []
    junk: list[str] = []
    hidden: list[str] = []
    broken: list[str] = []

    def visit(path: str, above: tuple[str, ...], linked: bool) -> Folder:
        # `above` has where this folder and those that the walk came by really are.
        visits[above[-1]] += 1
        if len(above) > MAX_DEPTH or visits[above[-1]] > MAX_VISITS:
            many = f"more than {MAX_VISITS:,} ways lead to the folder {above[-1]}"
            deep = f"more than {MAX_DEPTH} folders lie in one another"
            raise DatasetError(
                f"{printable(listing([path]))}: "
                f"{printable(deep if len(above) > MAX_DEPTH else many)}. Remove links, "
                "or list the images in a table with the columns path and label."
            )
        try:
            with os.scandir(path) as entries:
                found = sorted(entries, key=lambda x: (_composed(x.name), x.name))
        except OSError as error:
            raise DatasetError(
                f"{printable(path)}: cannot list the folder: {error.strerror}. Make it "
                "readable, or move it away."
            ) from error
        folder = Folder(path)
        for entry in found:
            is_folder = _is_folder(entry)
            target = os.path.realpath(entry.path) if entry.is_symlink() else None
            if entry.name.startswith("."):
                if not is_folder and entry.name.lower().endswith(IMAGE_ENDINGS):
                    hidden.append(entry.path)
            elif target and not _leads_to_something(entry):
                broken.append(f"{entry.path} -> {os.readlink(entry.path)}")
            elif not is_folder:
                if target or entry.is_file():  # and not a pipe, say
                    through = linked or target is not None
                    file = File(entry.path, above[-1], target, through, entry.inode())
                    folder.files.append(file)
                    folder.num_images += is_image(entry.path)
            elif entry.name.lower() in JUNK_FOLDERS:
                junk.append(entry.path)
            elif target and any(_holds(target, x) for x in above):
                upwards.append(f"{entry.path} -> {os.readlink(entry.path)}")
            else:
                real = target or os.path.join(above[-1], entry.name)
                through = linked or target is not None
                child = visit(entry.path, (*above, real), through)
                folder.folders[entry.name] = child
                folder.num_images += child.num_images
        return folder

    root = visit(os.fspath(path), (os.path.realpath(path),), False)
    for left, what in (
        (upwards, "links to a folder that they are in"),
        (broken, "links to what is not there"),
        (junk, "folders of other programs"),
        (hidden, "hidden images"),
    ):
        if left:
            logger.warning(
                "%s: left out %d %s: %s",
                printable(path),
                len(left),
                what,
                printable(listing(left, 3)),
            )
    return root


def each_once(where: str, files: list[tuple[File, str]]) -> list[tuple[File, str]]:
    """Leaves out links to files that are there already, and says so.

    Of a file that is found several times the one that no link leads to is kept, or else
    the first. Hard links, which are as good as the file itself, are kept, and told.

    Args:
      where: the dataset or split, for the warnings.
      files: each with its class.
    """
    kept = files
    if any(file.linked for file, _ in files):
        owners: dict[str, tuple[File, str]] = {}
        for pair in files:
            if pair[0].real not in owners or not pair[0].linked:
                owners[pair[0].real] = pair
        kept = [pair for pair in files if owners[pair[0].real] is pair]
        left = [pair for pair in files if owners[pair[0].real] is not pair]
        if left:
            others = sum(owners[file.real][1] != name for file, name in left)
            shown = [f"{x.path} = {owners[x.real][0].path}" for x, _ in left[:3]]
            logger.warning(
                "%s: left out %d links to images that are there already, %d of them in "
                "another class: %s",
                where,
                len(left),
                others,
                printable(listing(shown + ["…"] * (len(left) > 3), 4)),
            )
    _warn_of_hard_links(where, kept)
    return kept


def find_images(patterns: Iterable[str]) -> list[str]:
    """Returns the image files that paths, folders and globs stand for, each once.

    Args:
      patterns: each a file, whatever its ending; a folder, for the images in it and
        below; or a glob such as "photos/**/*.jpg", for the images and folders that it
        matches.

    Raises:
      FileNotFoundError: a pattern stands for no image; it is named.
      DatasetError: a folder cannot be listed.
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
                if os.path.isdir(match):
                    files = [(x, "") for x in scan(match).walk() if is_image(x.path)]
                    files = each_once(printable(match), files)
                    images += sorted(file.path for file, _ in files)
                elif is_image(match):
                    images.append(match)
        if not images:
            raise FileNotFoundError(
                f"{printable(pattern)}: no such file, nor a folder or glob with "
                f"images, which end in {' '.join(IMAGE_ENDINGS)}."
            )
        found |= dict.fromkeys(str(pathlib.Path(image)) for image in images)
    return list(found)


def is_image(file: str) -> bool:
    """Returns whether a path is one of an image, by its ending, and not hidden."""
    name = os.path.basename(file)
    return name.lower().endswith(IMAGE_ENDINGS) and not name.startswith(".")


def _composed(name: str) -> str:
    """Returns a name in the form that sorts alike on every system."""
    return unicodedata.normalize("NFC", name)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _leads_to_something(link: os.DirEntry[str]) -> bool:
    """Returns whether a link is one to an image, which is told when read, or whole."""
    return link.name.lower().endswith(IMAGE_ENDINGS) or os.path.exists(link.path)


def _holds(folder: str, path: str) -> bool:
    """Returns whether `path` is the folder or in it; both are real paths."""
    return path == folder or path.startswith(os.path.join(folder, ""))


def _warn_of_hard_links(where: str, files: list[tuple[File, str]]) -> None:
    by_inode: dict[int, tuple[File, str]] = {}
    twice, classes, shown, spurious = 0, 0, "", 0
    for file, name in files:
        first = by_inode.setdefault(file.inode, (file, name))
        if first[0] is file or file.linked or first[0].linked:
            continue
        # Numbers may agree by chance, as on two disks.
        if os.path.samefile(file.path, first[0].path):
            twice += 1
            classes += name != first[1]
            shown = shown or f"{file.path} = {first[0].path}"
        elif (spurious := spurious + 1) > 1000:  # of this file system they say nothing
            return
    if twice:
        logger.warning(
            "%s: %d images are hard links to others, %d of them in another class, such "
            "as %s; each counts",
            where,
            twice,
            classes,
            printable(shown),
        )
