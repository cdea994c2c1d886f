"""How many pixels an image file declares, and how many of them are decoded at most.

A file of a hundred bytes can declare gigabytes. It is refused before they are taken.
"""

import contextlib
import io
from typing import NamedTuple

from PIL import AvifImagePlugin, Jpeg2KImagePlugin, PpmImagePlugin, SunImagePlugin

from mixer_jax.data.formats import (
    SCAN,
    ImageError,
    Segments,
    has_transparency,
    is_gif,
    is_jpeg,
    is_png,
    is_tiff,
    is_webp,
    jpeg_segments,
    kind_of_file,
    png_chunk,
    tiff_pages,
)

# Bytes that decoding may take, however small the file: a white page of 8000 x 8000
# pixels compresses to nearly nothing. Resizing may take a sixth more.
MAX_BYTES = 400_000_000

# For larger files as many as this. Photographs have one to five, so all are read.
PIXELS_PER_BYTE = 10

# What OpenCV reads beside the formats below. Pillow knows their sizes. Its Image.open
# has a limit and a warning of its own, and is not used.
_OTHERS = (
    PpmImagePlugin.PpmImageFile,
    SunImagePlugin.SunImageFile,
    Jpeg2KImagePlugin.Jpeg2KImageFile,
    AvifImagePlugin.AvifImageFile,
)


class Declared(NamedTuple):
    """What an image file says of its size.

    Attributes:
      width: in pixels.
      height: in pixels.
      cost: bytes that decoding takes for each pixel, at most, as measured. OpenCV's
        image is copied once, which makes 2 for each channel.
    """

    width: int
    height: int
    cost: int


def check_size(data: bytes, segments: Segments | None = None) -> Declared:
    """Returns what a file declares; refuses one that declares too many pixels.

    Args:
      data: a file's contents, which `check_whole` accepts.
      segments: what `jpeg_segments` gives of a JPEG, if it is known.

    Raises:
      ImageError: there are too many pixels, or none; or it is no image.
    """
    declared = _declared(data, segments)
    width, height, cost = declared
    if width < 1 or height < 1:
        raise ImageError(f"damaged: it declares {width} x {height} pixels")
    most = max(MAX_BYTES // cost, PIXELS_PER_BYTE * len(data))
    if width * height > most:
        raise ImageError(
            f"it declares {width:,} x {height:,} pixels in {len(data):,} bytes; at "
            f"most {most:,} pixels are read from such a file. Save it smaller"
        )
    return declared


def _declared(data: bytes, segments: Segments | None) -> Declared:
    if is_jpeg(data):
        return _of_jpeg(data, segments or jpeg_segments(data))
    if is_png(data):
        depth = 2 if data[24] == 16 else 1
        cost = 12 if png_chunk(data, b"acTL") else 8 if has_transparency(data) else 6
        return Declared(_big(data[16:20]), _big(data[20:24]), depth * cost)
    if is_webp(data):
        return _of_webp(data)
    if is_gif(data):
        return Declared(_little(data[6:8]), _little(data[8:10]), 9)
    if is_tiff(data):
        return _of_tiff(data)
    if data.startswith(b"BM"):
        size = 2 if _little(data[14:18]) == 12 else 4  # the short header of OS/2
        sides = data[18 : 18 + size], data[18 + size : 18 + 2 * size]
        width, height = (int.from_bytes(x, "little", signed=True) for x in sides)
        return Declared(width, abs(height), 8)  # negative: from the top down
    for kind in _OTHERS:
        # Of many kinds: SyntaxError for another format, and the file may be anything.
        with contextlib.suppress(Exception), kind(io.BytesIO(data)) as image:
            if image.mode != "F":  # fractions, in a PFM
                return Declared(*image.size, 17)
    raise ImageError(kind_of_file(data))


def _of_jpeg(data: bytes, segments: Segments) -> Declared:
    width = height = channels = 0
    cost = 6
    for marker, start in segments:
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):  # a frame
            sides = data[start + 3 : start + 5], data[start + 5 : start + 7]
            height, width = map(_big, sides)
            channels = _big(data[start + 7 : start + 8])
            if marker > 0xC1:  # progressive: all coefficients are held
                cost = 11
        elif marker == SCAN:  # the first; so they are if it has not all channels
            if _big(data[start + 2 : start + 3]) != channels:
                cost = 11
            break
    return Declared(width, height, cost)


def _of_webp(data: bytes) -> Declared:
    kind = data[12:16]
    if kind == b"VP8X":
        width, height = _little(data[24:27]) + 1, _little(data[27:30]) + 1
        has_frames = _little(data[20:21]) & 2
        return Declared(width, height, 11 if has_frames else 8)
    if kind == b"VP8L":
        bits = _little(data[21:25])
        return Declared(bits % 2**14 + 1, (bits >> 14) % 2**14 + 1, 8)
    return Declared(_little(data[26:28]) % 2**14, _little(data[28:30]) % 2**14, 8)


def _of_tiff(data: bytes) -> Declared:
    def highest(*tags: int) -> int:
        return max(max(page.get(tag, (0,))) for tag in tags)

    page = (tiff_pages(data) or [{}])[0]
    channels = max(highest(277), 4)
    # A tile is held whole, even if it is larger than the image.
    width, height = highest(256, 322), highest(257, 323)
    return Declared(width, height, 2 * channels * (2 if highest(258) > 8 else 1))


def _big(data: bytes) -> int:
    return int.from_bytes(data, "big")


def _little(data: bytes) -> int:
    return int.from_bytes(data, "little")
