"""Files and folders are written whole or not at all, and errors say what to do."""

import contextlib
import errno
import os
import pathlib
import re
import shutil
import uuid
from collections.abc import Callable, Iterator

_PARTIAL = ".partial"  # ends the name of what is not yet whole

# What to do about the errors of a disk, by number; those of a network are others.
_ADVICE = {
    errno.ENOSPC: "Make room on that disk",
    errno.EDQUOT: "Make room on that disk, or ask for a higher quota",
    errno.EFBIG: "Raise the limit on the size of files",
    errno.ENOENT: "Its folder was removed, or its disk was taken away: bring it back",
    errno.ENOTDIR: "A file lies where a folder is expected: move it away",
    errno.EEXIST: "A file lies where a folder is expected: move it away",
    errno.EACCES: "Make its folder writable, or take another one",
    errno.EPERM: "Make its folder writable, or take another one",
    errno.EROFS: "Make its disk writable, or take another one",
    errno.EIO: "See to its disk",
    errno.ESTALE: "See to its disk",
    errno.ENODEV: "See to its disk",
}


class FileError(ValueError):
    """A path that cannot be written to."""


class DiskError(OSError):
    """A file or folder that cannot be written, as when the disk is full."""


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what a disk refuses inside the block into a DiskError.

    Args:
      path: of the file or folder that is written, for the message. An OSError about a
        path elsewhere is left as it is.
    """
    try:
        yield
    except DiskError:
        raise
    except Exception as error:
        number = error_number(error)
        name = os.fsdecode(getattr(error, "filename", None) or "")
        is_here = (name or str(path)).startswith(str(path))
        if number not in _ADVICE or not is_here:
            raise
        raise DiskError(
            f"{path} cannot be written: {os.strerror(number)}. {_ADVICE[number]}; then "
            "give the same command again."
        ) from error


def error_number(error: Exception) -> int:
    """Returns the number of an error of the system, such as ENOSPC; else 0."""
    if isinstance(error, OSError):
        return error.errno or 0
    # Orbax writes with TensorStore, which raises ValueErrors with this text.
    found = re.search(r"\[os_error_code='(\d+)'\]", str(error))
    return int(found[1]) if found else 0


def remove_partial(folder: pathlib.Path, *names: str) -> None:
    """Removes what a process that was killed left half-written in a folder.

    Args:
      folder: to look in.
      names: of the files that `replace_when_whole` writes there. Whatever else ends
        in .partial is somebody else's.
    """
    for name in names:
        for path in folder.glob(f"{name}.{32 * '[0-9a-f]'}{_PARTIAL}"):
            if path.is_file() and not path.is_symlink():
                path.unlink(missing_ok=True)


def to_disk(path: str | os.PathLike[str]) -> None:
    """Waits until a file or folder is on the disk, and not in memory only."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


@contextlib.contextmanager
def replace_when_whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a file beside `path` to write, and moves it there if all goes well.

    It is on the disk first: else a machine that is reset may have an empty file there.

    Raises:
      DiskError: the file cannot be written.
    """
    with writing(path):
        path, partial = _path_and_partial(path)
        try:
            yield partial
            to_disk(partial)
            os.replace(partial, path)
            with contextlib.suppress(OSError):  # not every disk can do it
                to_disk(path.parent)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder_when_whole(
    path: str | os.PathLike[str], may_replace: Callable[[pathlib.Path], bool]
) -> Iterator[pathlib.Path]:
    """Gives a folder beside `path` to fill, and moves it there if all goes well.

    Args:
      path: where nothing is, or an empty folder, or one that may be replaced.
      may_replace: says so of a folder that is not empty.

    Raises:
      FileError: `path` is a URL, a file, or a folder that may not be replaced.
      DiskError: it cannot be written.
    """
    with writing(path):
        yield from _replace_folder(path, may_replace)


def _replace_folder(
    path: str | os.PathLike[str], may_replace: Callable[[pathlib.Path], bool]
) -> Iterator[pathlib.Path]:
    path, partial = _path_and_partial(path)
    if path.exists() and not path.is_dir():
        raise FileError(f"{path} is a file, expected a folder or nothing.")
    if path.is_dir() and any(path.iterdir()) and not may_replace(path):
        names = ", ".join(sorted(x.name for x in path.iterdir())[:5])
        raise FileError(
            f"{path} is not empty, and would be replaced. In it: {names}. Name a new "
            "folder."
        )
    partial.mkdir()
    old = partial.with_suffix(".old")
    try:
        yield partial
        with contextlib.suppress(FileNotFoundError):
            os.rename(path, old)
        os.rename(partial, path)
    finally:
        if old.exists() and not path.exists():
            os.rename(old, path)
        for folder in (partial, old):
            shutil.rmtree(folder, ignore_errors=True)


def _path_and_partial(
    path: str | os.PathLike[str],
) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns a path, and one beside it for what is not yet whole."""
    if "://" in os.fspath(path):
        raise FileError(f"{path} is a URL; files are written to local paths only.")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: hosts that share a disk may share those too.
    return path, path.with_name(f"{path.name}.{uuid.uuid4().hex}{_PARTIAL}")


def most_array_bytes(size: int) -> int:
    """Returns how large the arrays in a file of `size` bytes may be, to be read.

    A thousand times as many zeros can be packed into it, but parameters cannot.
    """
    return 3 * size + 96 * 2**20
