"""Files and folders are written whole or not at all."""

import contextlib
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator


class FileError(ValueError):
    """A path that cannot be written to."""


@contextlib.contextmanager
def replace_when_whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a file beside `path` to write, and moves it there if all goes well."""
    path, partial = _path_and_partial(path)
    try:
        yield partial
        os.replace(partial, path)
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
    """
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
    return path, path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
