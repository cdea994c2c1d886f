"""Files are written whole or not at all."""

import contextlib
import os
import pathlib
import uuid
from collections.abc import Iterator


class FileError(ValueError):
    """A path that cannot be written to."""


@contextlib.contextmanager
def replace_when_whole(path: str | os.PathLike[str]) -> Iterator[pathlib.Path]:
    """Gives a file beside `path` to write, and moves it there if all goes well."""
    if "://" in os.fspath(path):
        raise FileError(f"{path} is a URL; files are written to local paths only.")
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not the process id: hosts that share a disk may share those too.
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
