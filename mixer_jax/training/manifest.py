"""What a checkpoint holds: the size and the hash of each file, the hash of each array.

The manifest is the last file that is written to a checkpoint, before its folder gets
the name by which it is found. A checkpoint without one is of an older run.
"""

import contextlib
import errno
import hashlib
import json
import os
import pathlib
import stat
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mixer_jax.files import DiskError, error_number, to_disk
from mixer_jax.json_files import parse_json

MANIFEST = "manifest.json"

# Orbax adds the time of its last rename to this one, after the manifest is written. No
# state is read from it, and the manifest has the numbers that it has.
METADATA = "_CHECKPOINT_METADATA"

# The fastest of hashlib where the processor has instructions for it, as most have.
_HASH = "sha256"


# Errors of the system that say what is on the disk, with 0 for all that have no number.
# Others, such as too many open files, say nothing of the checkpoint.
_DAMAGE = {
    0,
    errno.EINVAL,
    errno.EIO,
    errno.EISDIR,
    errno.ENAMETOOLONG,
    errno.ENOENT,
    errno.ENOTDIR,
}


class DamagedError(OSError):
    """A checkpoint is not as it was written."""


@contextlib.contextmanager
def reading(folder: pathlib.Path, name: str = "it") -> Iterator[None]:
    """Turns what goes wrong when a checkpoint is read into one of two errors.

    Args:
      folder: of the checkpoint, for messages.
      name: of what is read, for messages.

    Raises:
      DamagedError: the checkpoint is not as it was written.
      DiskError: it cannot be read now, and may be whole.
      MemoryError: it does not fit.
    """
    try:
        yield
    except (DamagedError, MemoryError):
        raise
    except Exception as error:  # of any class, as its libraries raise them
        number = error_number(error)
        if number not in _DAMAGE:
            raise DiskError(
                f"The checkpoint {folder} cannot be read: {os.strerror(number)}. It "
                "may be whole, and is left as it is. Mend that, then give the same "
                "command again."
            ) from error
        reason = str(error).partition(" [tensorstore_spec")[0]
        raise DamagedError(
            f"{name} cannot be read: {type(error).__name__}: {reason}"
        ) from error


class Manifest(NamedTuple):
    """What a checkpoint held when it was written.

    Attributes:
      files: (size in bytes, hash) by path, from the checkpoint's folder.
      arrays: dtype, shape and hash by name, as `hash_arrays` returns them.
      numbers: that were saved with the state.
    """

    files: dict[str, list[Any]]
    arrays: dict[str, str]
    numbers: dict[str, float]


def write_manifest(
    folder: pathlib.Path, arrays: Mapping[str, str], numbers: Mapping[str, float]
) -> None:
    """Hashes the files of a checkpoint, and waits until they are on the disk.

    Args:
      folder: of a checkpoint, complete but for this file.
      arrays: of the checkpoint, as `hash_arrays` returns them.
      numbers: to be kept with it.
    """
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != METADATA:
            name = path.relative_to(folder).as_posix()
            files[name] = [path.stat().st_size, _hash_of_file(path)]
            to_disk(path)
    content = {"files": files, "arrays": dict(arrays), "numbers": dict(numbers)}
    content[_HASH] = _hash_of_json(content)  # of this file itself
    (folder / MANIFEST).write_text(json.dumps(content, indent=1), "utf-8")
    to_disk(folder / MANIFEST)


def read_manifest(folder: pathlib.Path) -> Manifest | None:
    """Returns the manifest of a checkpoint; None if it has none.

    Raises:
      DamagedError: the manifest is not as it was written.
      DiskError: it cannot be read.
    """
    with reading(folder, MANIFEST):
        try:
            text = (folder / MANIFEST).read_bytes()
        except FileNotFoundError:
            return None
    try:
        content = parse_json(text)
        if content.pop(_HASH) == _hash_of_json(content):
            return Manifest(**content)
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise DamagedError(f"{MANIFEST} is not as it was written")


def check_files(folder: pathlib.Path, manifest: Manifest) -> None:
    """Compares the files of a checkpoint with what was written.

    Files that are there besides those of the manifest do not matter. Links count as
    files that are not there, and so does what is not in the folder.

    Raises:
      DamagedError: one is not as it was written.
      DiskError: one cannot be read.
    """
    real = os.path.realpath(folder)
    for name, (size, digest) in manifest.files.items():
        path = pathlib.Path(f"{real}/{name}")
        if "\0" in name or os.path.realpath(path) != f"{real}/{name}":
            raise DamagedError(f"{name} is not there")
        with reading(folder, name):
            try:
                found = path.lstat()
                is_file, found_size = stat.S_ISREG(found.st_mode), found.st_size
                found_digest = (
                    _hash_of_file(path) if is_file and found_size == size else ""
                )
            except FileNotFoundError:
                is_file = False
        if not is_file:
            raise DamagedError(f"{name} is not there")
        if found_size != size:
            raise DamagedError(f"{name} has {found_size:,} bytes, expected {size:,}")
        if found_digest != digest:
            raise DamagedError(f"{name} has other contents than were written")


def check_arrays(tree: Any, manifest: Manifest) -> None:
    """Raises DamagedError if an array is not the one that was written.

    One of which this process has only a part is not looked at, and neither is one that
    is read as another type.
    """
    for name, found in hash_arrays(tree).items():
        expected = manifest.arrays.get(name, "")
        kind, _, digest = found.partition(" ")
        if expected.startswith(f"{kind} ") and not expected.endswith(digest):
            raise DamagedError(f"the array {name} has other values than were written")


def hash_arrays(tree: Any) -> dict[str, str]:
    """Returns dtype, shape and hash of each array in a tree, by its name.

    Arrays of which this process has only a part are left out.
    """
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): _describe(array)
        for path, array in jax.tree_util.tree_leaves_with_path(tree)
        if isinstance(array, np.ndarray)
        or array.is_fully_addressable
        or array.is_fully_replicated
    }


def _describe(array: Any) -> str:
    values = np.asarray(array)
    shape = ",".join(map(str, values.shape))
    contents = np.ascontiguousarray(values).reshape(-1).view(np.uint8).data
    return f"{values.dtype}[{shape}] {hashlib.new(_HASH, contents).hexdigest()}"


def _hash_of_file(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, _HASH).hexdigest()


def _hash_of_json(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.new(_HASH, text.encode()).hexdigest()
