"""From an encoded file to the pixels a model sees.

Images are RGB, [height, width, 3], and stay in 0..255 until they are on the device;
`scale` says what happens to them there.
"""

import dataclasses
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from mixer_jax.data.randaugment import randaugment

cv2.setNumThreads(0)  # the pipeline already reads several images at once
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # ImageError says it

TRANSFERS = ("uint8", "float32")
EVALUATIONS = ("resize", "resize_then_central_crop", "resize_small_then_central_crop")


Permute = Callable[[np.ndarray], np.ndarray]


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


def scale(images: Any) -> Any:
    """Maps 0..255 to [-1, 1] as float32; NumPy and JAX arrays of any shape."""
    return (images.astype(np.float32) - 127.5) / 127.5


def resize(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes bilinearly without antialiasing, as TensorFlow does by default.

    Args:
      image: [h, w, 3], uint8 or float32.
      height: wanted height in pixels.
      width: wanted width in pixels.

    Returns:
      float32 [height, width, 3].
    """
    return cv2.resize(
        image.astype(np.float32), (width, height), interpolation=cv2.INTER_LINEAR
    )


def resize_small(image: np.ndarray, short_side: int) -> np.ndarray:
    """Resizes by area so that the shorter side is `short_side` pixels (big_vision).

    Args:
      image: uint8 [h, w, 3].
      short_side: wanted length of the shorter side in pixels.

    Returns:
      float32 [height, width, 3] of whole numbers: big_vision rounds down to uint8.
    """
    ratio = short_side / min(image.shape[:2])
    height, width = (round(side * ratio) for side in image.shape[:2])
    image = image.astype(np.float32)
    if ratio > 1:  # OpenCV averages areas only when it shrinks
        factor = math.ceil(ratio)
        image = image.repeat(factor, 0).repeat(factor, 1)
    resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return np.floor(resized)


def central_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the central [size, size, 3] out of [h, w, 3].

    Raises:
      ValueError: the image is smaller than that.
    """
    height, width = image.shape[:2]
    if min(height, width) < size:
        raise ValueError(
            f"Cannot crop {size}x{size} pixels out of {height}x{width}. Make pp.resize "
            f"at least pp.crop, which is {size}."
        )
    top, left = (height - size) // 2, (width - size) // 2
    return image[top : top + size, left : left + size]


def sample_inception_crop(
    rng: np.random.Generator,
    height: int,
    width: int,
    area_range: tuple[float, float] = (0.05, 1.0),
    aspect_range: tuple[float, float] = (0.75, 1.33),
) -> tuple[int, int, int, int]:
    """Draws a crop as TensorFlow's sample_distorted_bounding_box does.

    An aspect ratio is drawn first, then a *height* uniformly among those that the
    ratio and the area range allow. Small crops are therefore more common than where
    the area is drawn (torchvision, timm).

    Args:
      rng: source of randomness.
      height: of the image, in pixels.
      width: of the image, in pixels.
      area_range: bounds of the crop's share of the image's area.
      aspect_range: bounds of width / height.

    Returns:
      (top, left, height, width) in pixels; the whole image if 100 attempts fail.
    """
    min_area, max_area = (bound * height * width for bound in area_range)
    for _ in range(100):
        aspect = rng.uniform(*aspect_range)
        lowest = round(math.sqrt(min_area / aspect))
        highest = min(round(math.sqrt(max_area / aspect)), height)
        if round(highest * aspect) > width:
            highest = int((width + 0.5 - 1e-7) / aspect)
            highest -= round(highest * aspect) > width
        h = highest if lowest >= highest else int(rng.integers(lowest, highest + 1))
        w = round(h * aspect)
        if w * h < min_area:  # rounding may have left the range by a pixel
            h += 1
            w = round(h * aspect)
        if w * h > max_area:
            h -= 1
            w = round(h * aspect)
        fits = 0 < h <= height and 0 < w <= width
        if fits and min_area <= w * h <= max_area:
            # TensorFlow never draws the last possible position.
            top = int(rng.integers(height - h)) if h < height else 0
            left = int(rng.integers(width - w)) if w < width else 0
            return top, left, h, w
    return 0, 0, height, width


def to_transfer(
    image: np.ndarray, transfer: str, permute: Permute | None = None
) -> np.ndarray:
    """Makes float32 in 0..255 what crosses to the device.

    Args:
      image: float32 [h, w, 3].
      transfer: "uint8" rounds to the nearest level, a quarter of the bytes;
        "float32" sends the original's exact values, already in [-1, 1].
      permute: changes the image first.
    """
    if permute:
        image = permute(image)
    return np.rint(image).astype(np.uint8) if transfer == "uint8" else scale(image)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random crop, resize, random flip, RandAugment, in this order.

    vit_jax fine-tunes with the first three, big_vision pre-trains with all.

    Attributes:
      crop: side of the result, in pixels.
      area_range: see `sample_inception_crop`.
      aspect_range: see `sample_inception_crop`.
      flip: whether to mirror left-right every other image.
      transfer: see `to_transfer`.
      randaugment: (layers, magnitude), see `mixer_jax.data.randaugment`; no layers for
        none.
      permute: a last change to all images alike, see `mixer_jax.data.permute`.
    """

    crop: int
    area_range: tuple[float, float] = (0.05, 1.0)
    aspect_range: tuple[float, float] = (0.75, 1.33)
    flip: bool = True
    transfer: str = "uint8"
    randaugment: tuple[int, float] = (0, 0.0)
    permute: Permute | None = None

    def __call__(self, image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Returns [crop, crop, 3] for uint8 [h, w, 3]."""
        height, width = image.shape[:2]
        top, left, height, width = sample_inception_crop(
            rng, height, width, self.area_range, self.aspect_range
        )
        image = image[top : top + height, left : left + width]
        image = resize(image, self.crop, self.crop)
        if self.flip and rng.random() < 0.5:
            image = image[:, ::-1]
        layers, magnitude = self.randaugment
        if layers:
            levels = image.astype(np.uint8)  # big_vision rounds down here
            image = randaugment(levels, rng, layers, magnitude).astype(np.float32)
        return to_transfer(image, self.transfer, self.permute)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """One of the three evaluation transforms.

    Attributes:
      crop: side of the result, in pixels.
      evaluation: "resize" straight to crop x crop (vit_jax);
        "resize_then_central_crop", to resize x resize first (paper);
        "resize_small_then_central_crop", the short side to `resize` first
        (paper, big_vision).
      resize: see evaluation; in pixels.
      transfer: see `to_transfer`.
      permute: see TrainTransform.
    """

    crop: int
    evaluation: str = "resize"
    resize: int = 256
    transfer: str = "uint8"
    permute: Permute | None = None

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Returns [crop, crop, 3] for uint8 [h, w, 3]."""
        if self.evaluation == "resize":
            image = resize(image, self.crop, self.crop)
        elif self.evaluation == "resize_then_central_crop":
            image = central_crop(resize(image, self.resize, self.resize), self.crop)
        else:
            image = central_crop(resize_small(image, self.resize), self.crop)
        return to_transfer(image, self.transfer, self.permute)
