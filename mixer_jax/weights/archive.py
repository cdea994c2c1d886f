"""The arrays in an npz file, which may be damaged or come from anyone.

Nothing is unpickled or unpacked into files. What the headers say is compared with the
sizes of what is there before any memory is taken for it.
"""

import contextlib
import math
import pathlib
import zipfile
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from mixer_jax.files import most_array_bytes
from mixer_jax.weights import contents
from mixer_jax.weights.layout import CheckpointError

# What np.savez and np.savez_compressed write.
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)


class Member(NamedTuple):
    """An array in an npz file, of which the header has been read and found right."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    info: zipfile.ZipInfo


class Archive:
    """An open npz file.

    Attributes:
      members: its arrays. None holds objects.
    """

    def __init__(self, path: pathlib.Path, archive: zipfile.ZipFile):
        self._path, self._archive = path, archive
        infos = archive.infolist()
        self._check_sizes(infos)
        self.members = [self._read_header(info) for info in infos]

    def read(self, member: Member) -> np.ndarray:
        """Reads one array.

        Raises:
          CheckpointError: it is damaged.
        """
        with self._explained(member.name), self._archive.open(member.info) as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
            file.read()  # to the end, where the checksum is compared
        return array

    def _check_sizes(self, infos: Sequence[zipfile.ZipInfo]) -> None:
        found, size = sum(x.file_size for x in infos), self._path.stat().st_size
        if found > most_array_bytes(size):
            raise CheckpointError(
                f"{self._path} of {size:,} bytes would become {found:,} bytes of "
                "arrays, which is refused. Parameters rarely compress that much. If "
                "they are meant, write them without compression, with np.savez."
            )

    def _read_header(self, info: zipfile.ZipInfo) -> Member:
        name = info.filename.removesuffix(".npy")
        with self._explained(name):
            if info.compress_type not in _METHODS:
                raise ValueError("it is compressed in a way that np.savez has not")
            with self._archive.open(info) as file:
                shape, dtype = _read_header(file)
                size = info.file_size - file.tell()
            if dtype.hasobject:
                raise ValueError("it holds pickled objects")
            # Each side by itself: 0 times any number would be right too.
            is_right = all(0 <= side < 2**31 for side in shape) and dtype.itemsize
            if not is_right or math.prod(shape) * dtype.itemsize != size:
                raise ValueError(
                    f"its {size:,} bytes are no array of {dtype!s:.80} and the shape "
                    f"{shape!s:.80}, as its header says"
                )
        return Member(name, shape, dtype, info)

    @contextlib.contextmanager
    def _explained(self, name: str) -> Iterator[None]:
        """Makes one error of those of several libraries, whatever bytes they saw."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:
            raise CheckpointError(
                f"{self._path}: {name:.100} cannot be read ({error!s:.200}). Either "
                "the file is damaged, and another copy is needed, or it holds pickled "
                "objects, which are refused since loading them could run any code."
            ) from error


def _read_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Reads the header of an open npy file."""
    readers = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ValueError(f"its npy version is {version}")
    try:
        shape, _, dtype = readers[version](file)
    except MemoryError as error:  # of Python's parser, which reads brackets in brackets
        raise ValueError("its header is no description of an array") from error
    return shape, dtype


@contextlib.contextmanager
def open_npz(path: pathlib.Path) -> Iterator[Archive]:
    """Opens an npz file, or says what the path is instead.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no file.
      CheckpointError: the file is cut off, damaged or of another program, or an array
        holds objects.
    """
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder, expected an npz file. In it: "
            f"{', '.join(sorted(x.name for x in path.glob('*.npz'))) or 'no npz files'}"
        )
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    archive = contents.open_zip(path)
    if archive is None or not contents.may_be_npz(archive.namelist()):
        if archive:
            archive.close()
        raise _no_npz(path)
    with archive:
        yield Archive(path, archive)


def _no_npz(path: pathlib.Path) -> CheckpointError:
    if kind := contents.kind_of_file(path):
        return CheckpointError(f"{path} is no npz file but {kind}")
    with path.open("rb") as file:
        start = file.read(8)
    if start.startswith(b"PK"):
        return CheckpointError(
            f"{path} of {path.stat().st_size:,} bytes is cut off or damaged: its table "
            "of contents cannot be read. Fetch or copy the file again."
        )
    return CheckpointError(
        f"{path} is no npz file (a zip archive of arrays): it begins with {start!r}."
    )
