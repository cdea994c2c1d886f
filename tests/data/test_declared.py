import contextlib
import io
import os
import struct
import subprocess
import sys
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mixer_jax.data import declared
from mixer_jax.data.decode import ImageError, decode, read_file

from ..examples import tiff

RGB = Image.fromarray(np.random.default_rng(0).integers(0, 255, (11, 22, 3), "uint8"))


def saved(form: str, image: Image.Image = RGB, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def patched(data: bytes, start: int, new: bytes) -> bytes:
    return data[:start] + new + data[start + len(new) :]


def declaring(data: bytes, width: int, height: int) -> bytes:
    """The same file with another size in its header."""
    big, little = struct.pack(">II", width, height), struct.pack("<II", width, height)
    if data.startswith(b"\x89PNG"):
        data = patched(data, 16, big)
        return patched(data, 29, zlib.crc32(data[12:29]).to_bytes(4, "big"))
    if data.startswith(b"\xff\xd8"):
        (start,) = (x for x in map(data.find, (b"\xff\xc0", b"\xff\xc2")) if x > 0)
        return patched(data, start + 5, struct.pack(">HH", height, width))
    if data.startswith(b"GIF"):
        return patched(data, 6, struct.pack("<HH", width, height))
    if data.startswith(b"BM"):
        return patched(data, 18, little)
    if data[12:16] == b"VP8 ":
        return patched(data, 26, struct.pack("<HH", width, height))
    if data[12:16] == b"VP8L":
        return patched(data, 21, struct.pack("<I", width - 1 | (height - 1) << 14))
    if data[12:16] == b"VP8X":
        sizes = (x - 1 for x in (width, height))
        return patched(data, 24, b"".join(x.to_bytes(3, "little") for x in sizes))
    if data.startswith(b"P6"):
        return data.replace(b"22 11", b"%d %d" % (width, height))
    if data.startswith(b"II*"):
        return tiff(b"x" * 9, width, height, {})
    for old in (struct.pack(">II", 11, 22), struct.pack(">II", 22, 11)):
        data = data.replace(old, big)  # JPEG 2000 and AVIF, in all boxes
    return data


FILES = {
    "PNG": saved("PNG"),
    "JPEG": saved("JPEG"),
    "progressive JPEG": saved("JPEG", progressive=True),
    "WebP": saved("WEBP"),
    "lossless WebP": saved("WEBP", lossless=True),
    "WebP with frames": saved("WEBP", save_all=True, append_images=[RGB.rotate(180)]),
    "GIF": saved("GIF"),
    "BMP": saved("BMP"),
    "TIFF": saved("TIFF"),
    "PPM": saved("PPM"),
    "JPEG 2000": saved("JPEG2000"),
}


@pytest.mark.parametrize("kind", FILES)
def test_a_small_file_that_declares_a_large_image_is_refused(kind):
    data = FILES[kind]
    assert decode(data).shape == (11, 22, 3)
    large = declaring(data, 16_000, 16_000)  # OpenCV accepts up to 2**30 pixels
    with pytest.raises(ImageError, match=r"it declares .* pixels"):
        decode(large)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_an_image_without_pixels_is_damaged(kind):
    with pytest.raises(ImageError, match="damaged: it declares 0 x 0 pixels"):
        decode(declaring(FILES[kind], 0, 0))


def test_a_larger_file_may_have_more_pixels():
    data = declaring(FILES["PNG"], 9_000, 9_000)  # 81 million
    with pytest.raises(ImageError, match="at most 66,666,666 pixels are read"):
        declared.check_size(data)
    declared.check_size(data + bytes(8_100_000))


def test_a_tiff_may_not_hide_its_size():
    tile = {322: (60_000,), 323: (60_000,)}
    with pytest.raises(ImageError, match="declares 60,000 x 60,000"):
        decode(tiff(bytes(4), 2, 2, tile))
    # Of a tag that is there twice libtiff takes the first; so it is here.
    data = tiff(bytes(4), 60_000, 60_000, {})
    entry = data.index(struct.pack("<HHI", 258, 4, 1))
    with pytest.raises(ImageError, match="declares 60,000 x 60,000"):
        decode(patched(data, entry, struct.pack("<HHII", 256, 4, 1, 2)))


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xd8\xff\xc0\0\0\xff\xd9",
        b"\xff\xd8\xff\xda\0\0\xff\xd9",
        b"RIFF\x08\0\0\0WEBPVP8X",
        b"RIFF\x08\0\0\0WEBPVP8L",
        b"RIFF\x08\0\0\0WEBPVP8 ",
        b"GIF89a",
        b"BM",
        b"P6\n",
    ],
)
def test_headers_that_end_too_early(data):
    with pytest.raises(ImageError):
        decode(data)


STARTS = [
    *(b"\xff\xd8\xff", b"\xff\xd8\xff\xc0", b"\xff\xd8\xff\xda", b"\x89PNG\r\n\x1a\n"),
    *(b"RIFF\x08\0\0\0WEBPVP8" + x for x in (b"X", b"L", b" ")),
    *(b"GIF89a", b"BM", b"II*\0\x08\0\0\0", b"MM\0*\0\0\0\x08", b"P6\n", b""),
    *(b"\0\0\0\x0cjP  \r\n\x87\n", b"\0\0\0\x20ftypavif", b"\x59\xa6\x6a\x95"),
]


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(
    st.sampled_from(STARTS),
    st.binary(max_size=40),
    st.sampled_from([b"", b"\xff\xd9", b"\0\0\0\0IEND\xaeB`\x82", b"\x3b"]),
)
def test_a_few_bytes_are_an_image_or_an_error_of_ours(start, middle, end):
    with contextlib.suppress(ImageError):
        assert decode(start + middle + end).shape[2:] == (3,)


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (saved("TIFF", big_tiff=True), "a BigTIFF"),
        (b"P7\nWIDTH 1\nHEIGHT 1\nDEPTH 1\nMAXVAL 255\nENDHDR\n\0", "a PAM image"),
        (b"PF\n1 1\n-1.0\n" + bytes(12), "a PFM image"),
        (b"Pf\n1 1\n-1.0\n" + bytes(4), "a PFM image"),
        (b"#?RADIANCE\n\n-Y 1 +X 1\n" + bytes(4), "a Radiance HDR image"),
    ],
)
def test_formats_that_are_not_read_are_named(data, kind):
    with pytest.raises(ImageError, match=f"{kind}, which is not read; save it as PNG"):
        decode(data)


def test_large_files_of_rare_formats_are_read():
    # Pillow would refuse 180 million pixels, and warns of half as many.
    declared.check_size(declaring(FILES["PPM"], 18_000, 10_000) + bytes(18_000_000))


def test_a_jpeg_of_many_scans_is_refused():
    data = saved("JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    scans = data.count(b"\xff\xda")
    many = data[:last] + data[last:-2] * (101 - scans) + data[last:]
    with pytest.raises(ImageError, match="has 101 scans; expected at most 100"):
        decode(many)


def test_pages_of_a_tiff_that_share_bytes_do_not_take_hours():
    # Each of 5000 pages has the same 60,000 entries, and leads to the next one.
    data = bytearray(b"II*\0" + struct.pack("<I", 8) + bytes(900_000))
    for i in range(5000):
        start = 8 + 2 * i
        data[start : start + 2] = struct.pack("<H", 60_000)
    for i in range(5000):
        start = 8 + 2 * i
        end = start + 2 + 12 * 60_000
        data[end : end + 4] = struct.pack("<I", start + 2)
    with pytest.raises(ImageError):
        decode(bytes(data))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="has no pipes")
def test_pipes_and_devices_are_no_images(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", "/dev/zero"):
        with pytest.raises(ImageError, match="a pipe or device, and no file"):
            read_file(path)


def test_a_file_too_large_for_opencv_is_not_read(tmp_path):
    with open(tmp_path / "x.png", "wb") as file:
        file.truncate(2**31)
    with pytest.raises(ImageError, match=r"2,147,483,648 bytes; .* less than 2 GiB"):
        read_file(tmp_path / "x.png")


LARGEST = """
import pathlib, sys
from mixer_jax.data.decode import decode
from mixer_jax.data.interpolate import INTERPOLATIONS
from mixer_jax.data.preprocess import EvalTransform

def peak_bytes():
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

small, large = (pathlib.Path(x).read_bytes() for x in sys.argv[1:])
ways = [EvalTransform(224, "torchvision", 256, interpolation=x) for x in INTERPOLATIONS]
for way in ways:
    way(decode(small))
before = peak_bytes()
pixels = decode(large)
assert (pixels[::999, ::999] == pixels[0, 0]).all()
for way in ways:
    way(pixels)
print(pixels.shape[0], peak_bytes() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("side", "mode", "form", "options"),
    [
        (8_160, "RGB", "PNG", {}),
        (5_470, "RGB", "PNG", {}),  # all channels are resized at once
        (7_070, "RGBA", "PNG", {}),
        (5_770, "I;16", "PNG", {}),
        (6_030, "RGB", "JPEG", {"progressive": True, "subsampling": 0}),
    ],
)
def test_the_largest_plain_images_are_read_in_500_mb(
    tmp_path, side, mode, form, options
):
    """Their files of a few hundred kilobytes hold one colour."""
    for i, x in enumerate((9, side)):
        data = saved(form, Image.new(mode, (x, x)), **options)
        (tmp_path / f"{i}").write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", LARGEST, tmp_path / "0", tmp_path / "1"],
        capture_output=True,
        text=True,
        check=True,
    )
    height, growth = map(int, done.stdout.split())
    assert height == side
    assert growth < 500e6
