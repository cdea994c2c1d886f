"""Resizing images, in each way as one library does it."""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image

from mixer_jax.data.sizes import Size

cv2.setNumThreads(0)  # the pipeline already reads several images at once

Window = tuple[int, int, int, int]  # (top, left, height, width) in pixels

# Along one axis, which pixels of the source make an output pixel: of (length, size,
# start, count), the lengths of source and output, and the first and the number of the
# output pixels that are wanted. Positions int [n, count], and weights [n, count].
Taps = Callable[[int, int, int, int], tuple[np.ndarray, np.ndarray]]

# An enlarged image of more pixels is not made if only a window of it is wanted.
MAX_PIXELS = 2**18

# The channels of an image of more pixels are resized one after the other: in float32 it
# is four times as large, here 360 MB. It takes 1.5 times as long, and bilinear and
# bicubic results may differ by up to 1e-4.
MAX_AT_ONCE = 30_000_000

_PIL_BITS = 22  # of the fraction of PIL's weights, which are whole numbers


class Interpolation(NamedTuple):
    """A way to resize an image.

    Attributes:
      resize: makes float32 [*size, 3] of (image, size): uint8 [h, w, 3] and
        (height, width); without channels too.
      taps: what `resize` does when it enlarges.
      round_sum: what is done to the sums of pixels and weights, along one axis.
      equals: the library that gives the same pixels.
      averages: whether each output pixel is made of all the pixels that it covers.
      clip: whether `resize` goes beyond the values of pixels, which are cut off.
    """

    resize: Callable[[np.ndarray, Size], np.ndarray]
    taps: Taps
    round_sum: Callable[[np.ndarray], np.ndarray]
    equals: str
    averages: bool
    clip: bool = False


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
    way = INTERPOLATIONS[interpolation]
    top, left, height, width = window or (0, 0, *size)
    is_enlarged = size[0] > image.shape[0] and size[1] > image.shape[1]
    if window and is_enlarged and math.prod(size) > MAX_PIXELS:
        resized = _enlarged_window(image, size, window, way)
    else:
        wanted = np.s_[top : top + height, left : left + width]
        if image.shape[0] * image.shape[1] > MAX_AT_ONCE:
            channels = (image[..., i] for i in range(3))
            # A copy, so that the rest of the resized channel is not kept.
            parts = [way.resize(x, size)[wanted].copy() for x in channels]
            resized = np.stack(parts, -1)
        else:
            resized = way.resize(image, size)[wanted]
    return resized.clip(0, 255) if way.clip else resized


def _enlarged_window(
    image: np.ndarray, size: Size, window: Window, way: Interpolation
) -> np.ndarray:
    """Returns a window of an enlarged image.

    Only the window is computed, since the rest may not fit in memory: a 1 x 40,000
    image whose short side becomes 256 has ten million columns.
    """
    top, left, height, width = window
    rows, row_weights = way.taps(image.shape[0], size[0], top, height)
    columns, column_weights = way.taps(image.shape[1], size[1], left, width)
    strip = image[rows.min() : rows.max() + 1].take(columns, axis=1)
    strip = strip.astype(row_weights.dtype)
    strip = np.einsum("hnwc,nw->hwc", strip, column_weights)
    strip = way.round_sum(strip).take(rows - rows.min(), axis=0)
    strip = way.round_sum(np.einsum("nhwc,nh->hwc", strip, row_weights))
    return strip.astype(np.float32)


def _opencv(image: np.ndarray, size: Size, method: int) -> np.ndarray:
    return cv2.resize(image.astype(np.float32), size[::-1], interpolation=method)


def _area(image: np.ndarray, size: Size) -> np.ndarray:
    # OpenCV averages areas only when it shrinks an image. So pixels are repeated along
    # an axis that grows, and before that the other one is shrunk.
    height, width = (min(a, b) for a, b in zip(size, image.shape, strict=False))
    if (height, width) != size:
        image = _opencv(image, (height, width), cv2.INTER_AREA)
        for axis in (0, 1):
            image = image.repeat(math.ceil(size[axis] / image.shape[axis]), axis)
    return _opencv(image, size, cv2.INTER_AREA)


def _pillow(image: np.ndarray, size: Size, method: Image.Resampling) -> np.ndarray:
    return np.asarray(Image.fromarray(image).resize(size[::-1], method), np.float32)


def _area_taps(
    length: int, size: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
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


def _kernel_taps(
    length: int, size: int, start: int, count: int, a: float | None
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the taps of the cubic kernel with the parameter `a`; None for linear."""
    centres = (np.arange(start, start + count) + 0.5) * (length / size) - 0.5
    offsets = np.arange(0, 2) if a is None else np.arange(-1, 3)
    positions = np.floor(centres).astype(int) + offsets[:, None]
    x = np.abs(positions - centres)
    if a is None:
        return positions, 1 - x
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    return positions, np.where(x < 1, near, (((x - 5) * x + 8) * x - 4) * a)


def _opencv_taps(
    length: int, size: int, start: int, count: int, a: float | None
) -> tuple[np.ndarray, np.ndarray]:
    positions, weights = _kernel_taps(length, size, start, count, a)
    return positions.clip(0, length - 1), weights.astype(np.float32)


def _pillow_taps(
    length: int, size: int, start: int, count: int, a: float | None
) -> tuple[np.ndarray, np.ndarray]:
    positions, weights = _kernel_taps(length, size, start, count, a)
    inside = positions.clip(0, length - 1)
    weights = np.where(positions == inside, weights, 0)
    weights = weights / weights.sum(0) * 2**_PIL_BITS
    return inside, np.trunc(weights + np.copysign(0.5, weights))


def _pillow_round(sums: np.ndarray) -> np.ndarray:
    return np.floor(sums / 2**_PIL_BITS + 0.5).clip(0, 255)


# The choices for pp.interpolation. Those of PIL are antialiased and give whole numbers.
INTERPOLATIONS = {
    "bilinear": Interpolation(
        functools.partial(_opencv, method=cv2.INTER_LINEAR),
        functools.partial(_opencv_taps, a=None),
        lambda sums: sums,
        "TensorFlow's tf.image.resize, bilinear with antialias=False, and OpenCV",
        averages=False,
    ),
    "bicubic": Interpolation(
        functools.partial(_opencv, method=cv2.INTER_CUBIC),
        functools.partial(_opencv_taps, a=-0.75),
        lambda sums: sums,
        "PyTorch's interpolate, bicubic with antialias=False, and OpenCV",
        averages=False,
        clip=True,
    ),
    "area": Interpolation(
        _area,
        _area_taps,
        lambda sums: sums,
        "TensorFlow's tf.image.resize, area",
        averages=True,
    ),
    "pil_bilinear": Interpolation(
        functools.partial(_pillow, method=Image.Resampling.BILINEAR),
        functools.partial(_pillow_taps, a=None),
        _pillow_round,
        "PIL's resize, bilinear, of uint8",
        averages=True,
    ),
    "pil_bicubic": Interpolation(
        functools.partial(_pillow, method=Image.Resampling.BICUBIC),
        functools.partial(_pillow_taps, a=-0.5),
        _pillow_round,
        "PIL's resize, bicubic, of uint8",
        averages=True,
    ),
}
