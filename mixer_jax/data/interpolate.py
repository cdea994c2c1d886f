"""Resizing images, in each way as one library does it."""

import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from mixer_jax.data.sizes import Size

cv2.setNumThreads(0)  # the pipeline already reads several images at once

Window = tuple[int, int, int, int]  # (top, left, height, width) in pixels


class Interpolation(NamedTuple):
    """A way to resize an image.

    Attributes:
      resize: makes float32 [*size, 3], from 0 to 255, of (image, size): uint8 [h, w, 3]
        and (height, width).
      equals: the library that gives the same pixels.
    """

    resize: Callable[[np.ndarray, Size], np.ndarray]
    equals: str


def _opencv(method: int) -> Callable[[np.ndarray, Size], np.ndarray]:
    def resize(image: np.ndarray, size: Size) -> np.ndarray:
        resized = cv2.resize(image.astype(np.float32), size[::-1], interpolation=method)
        return resized.clip(0, 255) if method == cv2.INTER_CUBIC else resized

    return resize


def _pillow(method: Image.Resampling) -> Callable[[np.ndarray, Size], np.ndarray]:
    def resize(image: np.ndarray, size: Size) -> np.ndarray:
        resized = Image.fromarray(image).resize(size[::-1], method)
        return np.asarray(resized, np.float32)

    return resize


def _area(image: np.ndarray, size: Size) -> np.ndarray:
    # OpenCV averages areas only when it shrinks an image.
    for axis in (0, 1):
        factor = -(-size[axis] // image.shape[axis])
        if factor > 1:
            image = image.repeat(factor, axis)
    return _opencv(cv2.INTER_AREA)(image, size)


# The choices for pp.interpolation. Those of PIL are antialiased and give whole numbers.
INTERPOLATIONS = {
    "bilinear": Interpolation(
        _opencv(cv2.INTER_LINEAR),
        "TensorFlow's tf.image.resize, bilinear with antialias=False, and OpenCV",
    ),
    "bicubic": Interpolation(
        _opencv(cv2.INTER_CUBIC),
        "PyTorch's interpolate, bicubic with antialias=False, and OpenCV",
    ),
    "area": Interpolation(_area, "TensorFlow's tf.image.resize, area"),
    "pil_bilinear": Interpolation(
        _pillow(Image.Resampling.BILINEAR), "PIL's resize, bilinear, on uint8"
    ),
    "pil_bicubic": Interpolation(
        _pillow(Image.Resampling.BICUBIC), "PIL's resize, bicubic, on uint8"
    ),
}


def resample(
    image: np.ndarray, size: Size, interpolation: str, window: Window | None = None
) -> np.ndarray:
    """Resizes an image, or gives a window of the resized image.

    Args:
      image: uint8 [h, w, 3].
      size: (height, width) of the whole resized image in pixels.
      interpolation: a key of INTERPOLATIONS.
      window: which part of it is wanted, in pixels of the resized image; None for all.

    Returns:
      float32 [height, width, 3] of the window, from 0 to 255.
    """
    top, left, height, width = window or (0, 0, *size)
    if interpolation == "area" and min(np.divide(size, image.shape[:2])) > 1:
        # Only the window, since the rest may not fit in memory: a 1 x 40,000 image
        # whose short side becomes 256 has ten million columns.
        return _enlarged_window(image, size, (top, left, height, width))
    resized = INTERPOLATIONS[interpolation].resize(image, size)
    return resized[top : top + height, left : left + width]


def _enlarged_window(image: np.ndarray, size: Size, window: Window) -> np.ndarray:
    """Returns a window of an image that is enlarged by area.

    This gives, to the bit, what OpenCV makes of an image in which each pixel is
    repeated in both directions so that it must be shrunk.
    """
    top, left, height, width = window
    rows, row_weights = _area_weights(image.shape[0], size[0], top, height)
    columns, column_weights = _area_weights(image.shape[1], size[1], left, width)
    strip = image[rows.min() : rows.max() + 1].astype(np.float32)
    strip = np.einsum("hnwc,nw->hwc", strip.take(columns, axis=1), column_weights)
    strip = strip.take(rows - rows.min(), axis=0)
    return np.einsum("nhwc,nh->hwc", strip, row_weights)


def _area_weights(
    length: int, size: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which pixels an output pixel is the mean of, along one axis.

    Args:
      length: of the source in pixels.
      size: of the whole output in pixels, at least `length`.
      start: the first output pixel wanted.
      count: the number of output pixels wanted.

    Returns:
      Their positions in the source, int [n, count], and weights, float32 [n, count].
    """
    factor = math.ceil(size / length)  # how often each pixel is repeated
    scale = length * factor / size
    begin = np.arange(start, start + count) * scale
    end = begin + scale
    cells = np.floor(begin) + np.arange(3)[:, None]  # less than 2 wide: at most 3 cells
    overlap = np.minimum(end, cells + 1) - np.maximum(begin, cells)
    overlap[overlap < 1e-3] = 0  # as OpenCV does
    used = overlap.any(axis=1)  # with a scale of 1, one cell
    positions = np.minimum(cells[used], length * factor - 1).astype(int) // factor
    return positions, (overlap[used] / scale).astype(np.float32)
