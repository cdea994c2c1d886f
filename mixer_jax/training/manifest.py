"""What a checkpoint holds: the size and the hash of each file, the hash of each array.

The manifest is the last file that is written to a checkpoint, before its folder gets
the name by which it is found. A checkpoint without one is of an older run.
"""

import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mixer_jax.files import parse_json

MANIFEST = "manifest.json"

# Orbax adds the time of its last rename to this one, after the manifest is written.
METADATA = "_CHECKPOINT_METADATA"
_ADDED_LATER = "commit_timestamp_nsecs"

# The fastest of hashlib where the processor has instructions for it, as most have.
_HASH = "sha256"


class DamagedError(OSError):
    """A checkpoint is not as it was written."""


class Manifest(NamedTuple):
    """What a checkpoint held when it was written.

    Attributes:
      files: (size in bytes, hash) by path, from the checkpoint's folder.
      arrays: dtype, shape and hash by name, as `hash_arrays` returns them.
    """

    files: dict[str, list[Any]]
    arrays: dict[str, str]


def write_manifest(folder: pathlib.Path, arrays: Mapping[str, str]) -> None:
    """Hashes the files of a checkpoint, and waits until they are on the disk.

    Args:
      folder: of a checkpoint, complete but for this file.
      arrays: of the checkpoint, as `hash_arrays` returns them.
    """
    files = {}
    for name, path in sorted(_files(folder).items()):
        files[name] = [path.stat().st_size, _hash_of_file(path)]
        with path.open("rb") as file:
            os.fsync(file.fileno())
    content = {"files": files, "arrays": dict(arrays)}
    content[_HASH] = _hash_of_json(content)  # of this file itself
    with (folder / MANIFEST).open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: pathlib.Path) -> Manifest | None:
    """Returns the manifest of a checkpoint; None if it has none.

    Raises:
      DamagedError: the manifest is not as it was written.
    """
    try:
        content = parse_json((folder / MANIFEST).read_bytes())
        if content.pop(_HASH) == _hash_of_json(content):
            return Manifest(**content)
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError, AttributeError):
        pass
    raise DamagedError(f"{MANIFEST} is not as it was written")


def check_files(folder: pathlib.Path, manifest: Manifest) -> None:
    """Raises DamagedError if a file of a checkpoint is not as it was written.

    Files that are there besides those of the manifest do not matter.
    """
    found = _files(folder)
    for name, (size, digest) in manifest.files.items():
        if name not in found:
            raise DamagedError(f"{name} is not there")
        found_size = found[name].stat().st_size
        if name != METADATA and found_size != size:
            raise DamagedError(f"{name} has {found_size:,} bytes, expected {size:,}")
        try:
            is_same = _hash_of_file(found[name]) == digest
        except ValueError:  # METADATA is no JSON
            is_same = False
        if not is_same:
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
    contents = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    return f"{values.dtype}[{shape}] {hashlib.new(_HASH, contents).hexdigest()}"


def _files(folder: pathlib.Path) -> dict[str, pathlib.Path]:
    """Returns the files in a folder by their path from there; links are left out."""
    return {
        path.relative_to(folder).as_posix(): path
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


def _hash_of_file(path: pathlib.Path) -> str:
    """Returns the hash of a file's bytes; of METADATA, of what does not change."""
    with path.open("rb") as file:
        if path.name != METADATA:
            return hashlib.file_digest(file, _HASH).hexdigest()
        fields = parse_json(file.read())
    if isinstance(fields, dict):
        fields.pop(_ADDED_LATER, None)
    return _hash_of_json(fields)


def _hash_of_json(content: Any) -> str:
    text = json.dumps(content, sort_keys=True)
    return hashlib.new(_HASH, text.encode()).hexdigest()
