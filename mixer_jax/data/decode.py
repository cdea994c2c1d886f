"""From an encoded file to pixels, and what is wrong with a file."""

import re
import zlib

import cv2
import numpy as np

cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # ImageError says it


class ImageError(ValueError):
    """An image that cannot be read."""


def decode(data: bytes, *, upright: bool = False) -> np.ndarray:
    """Decodes JPEG, PNG, WebP and what else OpenCV reads, in RGB whatever the file has.

    Grey becomes three equal channels, a palette its colours. Of 16 bits the upper 8
    count, as in TensorFlow. CMYK is taken as inverted, as Adobe writes it and as
    browsers and Pillow take it. What is transparent shows white.

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
        if image.shape[2:] == (4,):  # OpenCV drops the transparency of grey images
            return _on_white(image)
    flags = cv2.IMREAD_COLOR_RGB | (0 if upright else cv2.IMREAD_IGNORE_ORIENTATION)
    return _imdecode(encoded, flags)


def check_whole(data: bytes) -> None:
    """Finds JPEG, PNG and WebP files that are cut off, and broken JPEG and PNG parts.

    OpenCV never says what is wrong, and takes a JPEG of which the end is overwritten.
    Looking first costs 3 to 5 % of decoding a photograph (benchmarks/decode.py). Damage
    that leaves a JPEG's or WebP's parts in place is not seen, nor does OpenCV see it.

    Args:
      data: a file's contents, of any format.

    Raises:
      ImageError: saying what is missing.
    """
    if data.startswith(b"\xff\xd8"):
        _check_jpeg(data)
    elif data.startswith(b"\x89PNG\r\n\x1a\n"):
        _check_png(data)
    elif data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        length = 8 + int.from_bytes(data[4:8], "little")
        if len(data) < length:
            raise ImageError(f"the file is cut off: {len(data):,} of {length:,} bytes")


# In a JPEG's compressed pixels FF is followed by 00, or by the number of a restart; FF
# may also be repeated. All else is a marker: of a segment, or of the image's end.
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
    """Goes from chunk to chunk, up to the last one, and compares checksums."""
    position, name = 8, b""
    while name != b"IEND":
        name = data[position + 4 : position + 8]
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        if end + 4 > len(data):
            raise ImageError("the PNG is cut off or damaged: it has no end chunk")
        checksum = int.from_bytes(data[end : end + 4], "big")
        # Chunks with a capital letter are those without which there is no image.
        if name[:1].isupper() and zlib.crc32(data[position + 4 : end]) != checksum:
            raise ImageError(
                f"the PNG is damaged between bytes {position:,} and {end:,}"
            )
        position = end + 4


def _has_transparency(data: bytes) -> bool:
    if data.startswith(b"\x89PNG"):
        has_alpha = data[25:26] in (b"\4", b"\6")  # with grey, with RGB
        return has_alpha or b"tRNS" in data[: data.find(b"IDAT")]
    if data[8:15] == b"WEBPVP8":  # followed by X, extended, or L, lossless
        flags = {b"X": data[20:21], b"L": data[24:25]}.get(data[15:16])
        return bool(flags and flags[0] & 0x10)
    return False


def _on_white(image: np.ndarray) -> np.ndarray:
    """Returns uint8 RGB [h, w, 3] for uint8 or uint16 BGRA [h, w, 4]."""
    if image.dtype == np.uint16:
        image = image >> 8
    rgb, alpha = image[..., 2::-1].astype(np.uint16), image[..., 3:].astype(np.uint16)
    return ((rgb * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)


def _imdecode(encoded: np.ndarray, flags: int) -> np.ndarray:
    try:
        image = cv2.imdecode(encoded, flags)
    except cv2.error as error:  # more pixels than OpenCV takes
        raise ImageError(f"OpenCV cannot read it: {error.err}") from error
    if image is None:
        start = encoded[:8].tobytes()
        raise ImageError(f"damaged or not an image: the file begins with {start!r}")
    return image
