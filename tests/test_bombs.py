"""Small files that declare gigabytes are refused before memory is taken for them."""

import io
import json
import struct
import subprocess
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image, features

from .data.test_declared import FILES, RGB, declaring, saved
from .examples import tiff

# The address space may grow by what the promise allows: 10 times the file and 500 MB.
READ = """
import pathlib, resource, sys
from mixer_jax import load_checkpoint
from mixer_jax.data.decode import ImageError, decode
from mixer_jax.weights.layout import CheckpointError

def read(path):
    if path.suffix in (".npz", ".safetensors"):
        load_checkpoint(path)
    else:
        decode(path.read_bytes())

folder = pathlib.Path(sys.argv[1])
for path in sorted(folder.iterdir()):
    status = pathlib.Path("/proc/self/status").read_text()
    used = 1024 * int(status.partition("VmSize:")[2].split()[0])
    limit = used + 10 * path.stat().st_size + 500_000_000
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    try:
        read(path)
    except (ImageError, CheckpointError) as error:
        assert not isinstance(error.__cause__, MemoryError)
        print(path.name, error, sep=": ")
    resource.setrlimit(resource.RLIMIT_AS, 2 * (resource.RLIM_INFINITY,))
"""


def npz(member: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        archive.writestr("head/bias.npy", member)
    return file.getvalue()


def npy(shape: tuple[int, ...]) -> bytes:
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue()


def safetensors(shape: tuple[int, ...], end: int) -> bytes:
    array = {"dtype": "F32", "shape": shape, "data_offsets": [0, end]}
    header = json.dumps({"head.bias": array}).encode()
    return struct.pack("<Q", len(header)) + header + bytes(20)


def bombs() -> dict[str, tuple[bytes, str]]:
    """The contents of files, and what is said of each."""
    images = {kind: declaring(data, 16_000, 16_000) for kind, data in FILES.items()}
    for kind, image, options in (
        ("RGBA PNG", RGB.convert("RGBA"), {}),
        ("PNG of 16 bits", Image.new("I;16", (22, 11)), {}),
        ("PNG with frames", RGB, {"save_all": True, "append_images": [RGB]}),
    ):
        images[kind] = declaring(saved("PNG", image, **options), 16_000, 16_000)
    if features.check("avif"):
        images["AVIF"] = declaring(saved("AVIF"), 16_000, 16_000)
    sides = {322: (16_384,), 323: (12_288,)}
    images["TIFF with a tile"] = tiff(bytes(400), 20, 20, sides)
    sun = 0x59A66A95, 16_000, 16_000, 24, 0, 1, 0, 0
    images["Sun raster"] = struct.pack(">8I", *sun)
    declared = {kind: (data, "it declares ") for kind, data in images.items()}
    big = saved("TIFF", big_tiff=True)
    zeros = npy((2**26,)) + bytes(2**28)
    length, beyond = struct.pack("<Q", 2**62), (2**31, 2**31)
    return declared | {
        "BigTIFF": (big, "a BigTIFF, which is not read"),
        "zeros.npz": (npz(zeros, zipfile.ZIP_DEFLATED), "which is refused"),
        "shape.npz": (npz(npy((2**40,)) + bytes(20)), "head/bias cannot be read"),
        "length.safetensors": (length + bytes(20), "is no whole safetensors file"),
        "shape.safetensors": (safetensors(beyond, 20), "is no whole safetensors file"),
        "end.safetensors": (
            safetensors((2**33,), 2**35),
            "is no whole safetensors file",
        ),
    }


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_small_files_that_declare_gigabytes_are_refused(tmp_path):
    expected = bombs()
    assert len(expected) >= 20
    for name, (data, _) in expected.items():
        (tmp_path / name).write_bytes(data)
        assert len(data) < 300_000
    done = subprocess.run(
        [sys.executable, "-c", READ, tmp_path], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(": ", 1) for line in done.stdout.splitlines())
    for name, (_, message) in expected.items():
        assert message in said.get(name, "it was read"), name
