"""From the contents of an image file to pixels."""

import errno
import logging
import os
import pathlib
import stat
import struct
import time
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import cv2
import numpy as np

from mixer_jax.data.declared import check_size
from mixer_jax.data.formats import (
    ImageError,
    check_whole,
    has_transparency,
    is_jpeg,
    is_png,
    is_tiff,
    is_webp,
    num_frames,
    orientation,
    png_chunk,
    significant_bits,
    tiff_pages,
)
from mixer_jax.data.jpeg import Pixels, imdecode, open_jpeg, turned, whole

logger = logging.getLogger(__name__)

# ImageError says what is wrong. OpenCV 4 and 5 have the function in different places.
silence = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel
silence(0)

# Errors that a second attempt does not mend; others may be those of a network disk.
_LASTING = (
    *(errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.ENXIO),
)

_said: set[str] = set()  # what is said once, of the first file


class ImageFileError(ImageError):
    """The file of an image cannot be read, whatever is in it."""


def open_image(path: str | os.PathLike[str]) -> BinaryIO:
    """Opens a file, and nothing else: a pipe would wait, a device may have no end.

    Raises:
      OSError: it cannot be opened.
      ImageError: it is no file, or larger than OpenCV reads.
    """

    def at_once(path: str, flags: int) -> int:  # a pipe too
        return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))

    file = open(path, "rb", opener=at_once)  # noqa: SIM115
    about = os.fstat(file.fileno())
    if stat.S_ISREG(about.st_mode) and about.st_size < 2**31:
        return file
    file.close()
    raise ImageError(
        f"{about.st_size:,} bytes; OpenCV reads files of less than 2 GiB"
        if stat.S_ISREG(about.st_mode)
        else "a pipe or device, and no file"
    )


def read_file(path: pathlib.Path, wait_secs: Sequence[float] = (1, 5)) -> bytes:
    """Returns a file's contents; after a failure waits and tries again.

    Raises:
      ImageFileError: it cannot be read.
    """
    try:
        with open_image(path) as file:
            return file.read()
    except OSError as error:
        if not wait_secs or error.errno in _LASTING:
            raise ImageFileError(error.strerror or str(error)) from error
    time.sleep(wait_secs[0])
    return read_file(path, wait_secs[1:])


def decode(data: bytes, *, upright: bool = False, name: str = "an image") -> np.ndarray:
    """Decodes JPEG, PNG, WebP, BMP, GIF, TIFF, and PPM, JPEG 2000, AVIF and Sun raster.

    No BigTIFF, and no format with fractions (PFM, Radiance HDR).

    A file that declares more pixels than `mixer_jax.data.declared` allows for its size
    is refused before memory is taken for them.

    Grey becomes three equal channels, a palette its colours. Of 16 bits the upper 8
    are kept, as in TensorFlow; or the upper 8 of those that the file says it uses. CMYK
    is taken as inverted, as Adobe writes it and as browsers and Pillow read it.
    Transparent pixels become white. Of several frames the first is taken.

    Args:
      data: the file's contents.
      upright: whether to turn the image as its EXIF orientation says. A TIFF always is.
      name: of the file, for what is said once: that a file has several frames, or 16
        bits of which it uses fewer without saying so.

    Returns:
      uint8 [height, width, 3], RGB.

    Raises:
      ImageError: the bytes are not an image, not a whole one, or too large a one.
    """
    return whole(open_pixels(data, upright=upright, name=name))


def open_pixels(
    data: bytes, *, upright: bool = False, name: str = "an image"
) -> Pixels:
    """Returns what `decode` does, or a Jpeg, which decodes what is asked of it.

    Args:
      data: see `decode`.
      upright: see `decode`.
      name: see `decode`.

    Raises:
      ImageError: as `decode` does. A Jpeg is checked, but not decoded.
    """
    if not data:
        raise ImageError("the file is empty")
    try:
        if is_jpeg(data):
            return open_jpeg(data, upright)
        return _decode(data, upright, name)
    except (IndexError, struct.error) as error:  # reading what stands in headers
        raise ImageError("damaged: a header ends too early") from error


def _decode(data: bytes, upright: bool, name: str) -> np.ndarray:
    check_whole(data)
    check_size(data)
    if (frames := num_frames(data)) > 1:
        say_once("frames", f"{name} has {frames} frames; the first is taken")
    tiff = tiff_pages(data)[:1] if is_tiff(data) else []
    page = tiff[0] if tiff else {}
    _refuse_unusual(page)
    # OpenCV turns TIFF; PNG not with transparency, and WebP since version 5.
    turn = orientation(data) if upright and (is_webp(data) or is_png(data)) else 1
    image = None
    if has_transparency(data):
        image = _without_transparency(data, page, name)
    if image is None:
        deep = (is_png(data) and data[24] == 16) or _bits_per_sample(page) > 8
        flags = cv2.IMREAD_COLOR_RGB | (cv2.IMREAD_ANYDEPTH if deep else 0)
        if not upright or turn > 1:
            flags |= cv2.IMREAD_IGNORE_ORIENTATION
        image = _to_8_bits(imdecode(data, flags), data, page, name)
        if deep and page.get(262) == (0,):  # OpenCV does so for 8 bits alone
            image = 255 - image  # 0 means white
    return image if turn == 1 else turned(image, turn)


def _without_transparency(
    data: bytes, page: dict[int, tuple[int, ...]], name: str
) -> np.ndarray | None:
    """Returns uint8 RGB [h, w, 3] on white; None if no pixel can be transparent."""
    image = imdecode(data, cv2.IMREAD_UNCHANGED)
    eight = _to_8_bits(image, data, page, name)
    if image.shape[2:] == (4,):
        # Are the colours already multiplied with alpha: by OpenCV, or in the file?
        applied = page and (image.dtype == np.uint8 or page[338] == (1,))
        on_white = np.empty((*image.shape[:2], 3), np.uint8)
        for rows in _strips(image):
            rgb, alpha = (
                eight[rows, :, 2::-1].astype(np.uint16),
                eight[rows, :, 3:].astype(np.uint16),
            )
            if applied:
                on_white[rows] = np.minimum(rgb + 255 - alpha, 255)
            else:
                on_white[rows] = (rgb * alpha + 255 * (255 - alpha) + 127) // 255
        return on_white
    if is_png(data) and data[25] == 0:  # OpenCV drops a grey PNG's transparency
        eight = np.where(image == _transparent_level(data), np.uint8(255), eight)
        return cv2.cvtColor(eight, cv2.COLOR_GRAY2RGB)
    if page and image.ndim == 2:
        raise ImageError("a grey TIFF with transparency; save it as PNG")
    return None


def _transparent_level(data: bytes) -> int:
    """Returns the transparent level of a grey PNG as OpenCV gives it."""
    depth = data[24]
    level = int.from_bytes(png_chunk(data, b"tRNS"), "big") & (2**depth - 1)
    return level * 255 // (2**depth - 1) if depth < 8 else level


def _bits_per_sample(page: dict[int, tuple[int, ...]]) -> int:
    return max(page.get(258, (1,)))


def _refuse_unusual(page: dict[int, tuple[int, ...]]) -> None:
    """Raises ImageError for a TIFF whose values have no range that one could know."""
    kinds = {2: "with a sign", 3: "with a fraction"}
    kind = kinds.get(page.get(339, (1,))[0], "")
    if kind or _bits_per_sample(page) > 16:
        raise ImageError(
            f"a TIFF of {_bits_per_sample(page)} bits a sample {kind}".rstrip()
            + "; expected at most 16 bits without sign or fraction. Convert it"
        )


def _to_8_bits(
    image: np.ndarray, data: bytes, page: dict[int, tuple[int, ...]], name: str
) -> np.ndarray:
    """Returns uint8 of the same shape, of uint8 or of the upper bits of uint16.

    The upper bits are those of 16, or of the bits that the file says it uses if all
    values fit in these. A PNG should spread such values over all 16 bits (its
    specification, section 12.4); many do not, which shows since the values of one that
    does lie a fixed step apart.
    """
    if image.dtype == np.uint8:
        return image
    colours = image[..., :3] if image.ndim == 3 else image
    highest = int(colours.max())
    packed = page and _bits_per_sample(page) < 16  # OpenCV moves these bits up
    bits = None if packed else significant_bits(data)
    if bits is None and 0 < highest < 2**12 and not packed:
        say_once(
            "bits",
            f"{name} has 16 bits a channel and values up to {highest} of 65535, and so "
            "is nearly black. If it uses fewer bits, write it with their number (sBIT "
            "of a PNG, MaxSampleValue of a TIFF), or with 8 bits",
        )
    if bits is None or not 0 < bits < 16 or highest >= 2**bits:
        bits = 16
    elif is_png(data):
        step = 65535 / (2**bits - 1)
        if all(
            (np.abs(x - np.rint(x / step) * step) <= 1).all()
            for x in (colours[rows] for rows in _strips(image))
        ):
            bits = 16
    eight = np.empty(image.shape, np.uint8)
    for rows in _strips(image):
        if bits < 8:
            levels = 2**bits - 1
            eight[rows] = np.minimum(image[rows], levels) * 255 // levels
        else:
            eight[rows] = np.minimum(image[rows] >> (bits - 8), 255)
    return eight


def _strips(image: np.ndarray) -> Iterator[slice]:
    """Gives a few rows of an image at a time, so that what is made of them is small."""
    height, width = image.shape[:2]
    count = max(2**18 // width, 1)
    return (slice(start, start + count) for start in range(0, height, count))


def say_once(what: str, message: str) -> None:
    """Warns of something that many images may have, for the first of them."""
    if what not in _said:
        _said.add(what)
        logger.warning("%s (said once)", message, extra={"once": (what, message)})
