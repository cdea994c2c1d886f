"""From the contents of an image file to pixels, and what is wrong with a file."""

import pathlib
import re
import time
import zlib
from collections.abc import Iterator, Sequence

import cv2
import numpy as np

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # ImageError says it

# Errors that a second attempt does not mend; others may be those of a network disk.
_LASTING = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
)

_PNG = b"\x89PNG\r\n\x1a\n"


class ImageError(ValueError):
    """An image that cannot be read."""


def read_file(path: pathlib.Path, wait_secs: Sequence[float] = (1, 5)) -> bytes:
    """Returns a file's contents; after a failure waits and tries again.

    Raises:
      ImageError: it cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        if not wait_secs or isinstance(error, _LASTING):
            raise ImageError(error.strerror or str(error)) from error
    time.sleep(wait_secs[0])
    return read_file(path, wait_secs[1:])


def decode(data: bytes, *, upright: bool = False) -> np.ndarray:
    """Decodes JPEG, PNG, WebP and the other formats that OpenCV reads.

    Grey becomes three equal channels, a palette its colours. Of 16 bits the upper 8
    are kept, as in TensorFlow. CMYK is taken as inverted, as Adobe writes it and as
    browsers and Pillow read it. Transparent pixels become white.

    Args:
      data: the file's contents.
      upright: whether to turn the image as its EXIF orientation says. An image with
        transparency, which no camera writes, stays as it is.

    Returns:
      uint8 [height, width, 3], RGB.

    Raises:
      ImageError: the bytes are not an image, or not a whole one.
    """
    if not data:
        raise ImageError("the file is empty")
    check_whole(data)
    encoded = np.frombuffer(data, np.uint8)
    if _has_transparency(data):
        image = _imdecode(encoded, cv2.IMREAD_UNCHANGED)
        if image.shape[2:] == (4,):
            return _on_white(image)
        if data[25] == 0:  # OpenCV drops the transparency of grey PNGs
            return _grey_on_white(image, _transparent_level(data))
    flags = cv2.IMREAD_COLOR_RGB | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    return _imdecode(encoded, flags)


def check_whole(data: bytes) -> None:
    """Finds JPEG, PNG and WebP files that are cut off, and broken JPEG and PNG parts.

    OpenCV does not say what is wrong, and accepts a JPEG whose end is overwritten. The
    check costs 3 to 5 % of the time to decode a photograph (benchmarks/decode.py).
    Neither it nor OpenCV sees damage within the parts of a JPEG or WebP file.

    Args:
      data: a file's contents, of any format.

    Raises:
      ImageError: says what is missing.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(_PNG):
        _check_png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        length = 8 + int.from_bytes(data[4:8], "little")
        if len(data) < length:
            raise ImageError(f"the file is cut off: {len(data):,} of {length:,} bytes")


# In the compressed pixels of a JPEG, 00 or the number of a restart follows FF, and FF
# may be repeated. FF with any other byte is a marker: a segment begins or the image
# ends.
_JPEG_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")


def _check_jpeg(data: bytes) -> None:
    """Goes from segment to segment, over the pixels, to the end of the image."""
    position = 2
    while match := _JPEG_MARKER.search(data, position):
        marker = match[0][1]
        if marker == 0xD9:
            return
        if marker < 0xC0:  # 01..BF are not in use
            raise ImageError(f"the JPEG is damaged at byte {match.start():,}")
        length = int.from_bytes(data[match.end() : match.end() + 2], "big")
        position = match.end() + length
    raise ImageError("the JPEG is cut off or damaged: it has no end-of-image marker")


def _check_png(data: bytes) -> None:
    """Compares the checksums of all parts without which there is no image."""
    for name, start, end in _png_chunks(data):
        checksum = int.from_bytes(data[end : end + 4], "big")
        # The names of such parts begin with a capital letter.
        if name[:1].isupper() and zlib.crc32(data[start - 4 : end]) != checksum:
            raise ImageError(
                f"the PNG is damaged between bytes {start - 8:,} and {end:,}"
            )


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, int, int]]:
    """Gives the name of each part of a PNG, and where its contents start and end."""
    name, end = b"", len(_PNG) - 4
    while name != b"IEND":
        start = end + 12  # a checksum, a length and a name, of 4 bytes each
        name = data[start - 4 : start]
        end = start + int.from_bytes(data[start - 8 : start - 4], "big")
        if end + 4 > len(data):
            raise ImageError("the PNG is cut off or damaged: it has no end chunk")
        yield name, start, end


def _has_transparency(data: bytes) -> bool:
    if data.startswith(_PNG):
        has_alpha = data[25] in (4, 6)  # grey with alpha, RGB with alpha
        return has_alpha or bool(_png_transparency(data))
    if data[8:15] == b"WEBPVP8":  # followed by X, extended, or L, lossless
        flags = {b"X": data[20:21], b"L": data[24:25]}.get(data[15:16])
        return bool(flags and flags[0] & 0x10)
    return False


def _png_transparency(data: bytes) -> bytes:
    """Returns the contents of a PNG's tRNS chunk, which comes before the pixels."""
    for name, start, end in _png_chunks(data):
        if name == b"tRNS":
            return data[start:end]
        if name == b"IDAT":
            break
    return b""


def _transparent_level(data: bytes) -> int:
    """Returns the transparent level of a grey PNG as OpenCV gives it."""
    depth = data[24]
    level = int.from_bytes(_png_transparency(data), "big") & (2**depth - 1)
    return level * 255 // (2**depth - 1) if depth < 8 else level


def _grey_on_white(image: np.ndarray, level: int) -> np.ndarray:
    """Returns uint8 RGB [h, w, 3] for uint8 or uint16 grey [h, w]; `level` is white."""
    grey = np.where(image == level, np.iinfo(image.dtype).max, image)
    if image.dtype == np.uint16:
        grey >>= 8
    return cv2.cvtColor(grey.astype(np.uint8), cv2.COLOR_GRAY2RGB)


def _on_white(image: np.ndarray) -> np.ndarray:
    """Returns uint8 RGB [h, w, 3] for uint8 or uint16 BGRA [h, w, 4]."""
    if image.dtype == np.uint16:
        image = image >> 8
    rgb, alpha = image[..., 2::-1].astype(np.uint16), image[..., 3:].astype(np.uint16)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _imdecode(encoded: np.ndarray, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(encoded, flags)
    except cv2.error as error:  # more pixels than OpenCV accepts
        raise ImageError(f"OpenCV cannot read it: {error.err}") from error
    if image is None:
        start = encoded[:8].tobytes()
        raise ImageError(f"damaged or not an image: the file begins with {start!r}")
    return image
