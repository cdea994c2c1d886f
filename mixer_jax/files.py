"""Files and folders are written whole or not at all; JSON is read within bounds."""

import contextlib
import json
import os
import pathlib
import shutil
import uuid
from collections.abc import Callable, Iterator
from typing import Any

# In bytes. Parsed, a JSON text takes up to 24 times its size. The largest that this
# package writes are lists of class names: those of ImageNet-21k are 0.5 MB.
LARGEST_JSON = 2**24
_DEEPEST_JSON = 100


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


def most_array_bytes(size: int) -> int:
    """Returns how large the arrays in a file of `size` bytes may be, to be read.

    A thousand times as many zeros can be packed into it, but parameters cannot.
    """
    return 3 * size + 96 * 2**20


def read_json(path: pathlib.Path, error: Callable[[str], Exception]) -> Any:
    """Reads a JSON file that may be damaged, or come from anyone.

    Args:
      path: of the file, with or without a byte order mark.
      error: makes the error from its message.

    Raises:
      FileNotFoundError: there is none.
      OSError: it cannot be read.
      What `error` makes: it is no file, or as for `parse_json`.
    """
    if path.exists() and not path.is_file():  # a pipe would wait, a device never end
        raise error(f"{path} is no file. Expected one with a JSON text.")
    with path.open("rb") as file:
        text = file.read(LARGEST_JSON + 1)
    try:
        return parse_json(text)
    except ValueError as problem:
        raise error(f"{path} is no JSON file: {problem}.") from problem


def parse_json(text: str | bytes) -> Any:
    """Returns the values in a JSON text that may be damaged, or come from anyone.

    A whole number that no float can hold becomes infinite, as others do.

    Raises:
      ValueError: it is no JSON text, larger than LARGEST_JSON, or nested more than a
        hundred times.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"found more than {LARGEST_JSON:,} bytes")
    too_deep = ValueError(f"it is nested more than {_DEEPEST_JSON} times")
    try:
        values = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise too_deep from None
    level = [values]
    for _ in range(_DEEPEST_JSON):
        parents = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in parents for y in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise too_deep
    return values


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < 300 else float(digits)
