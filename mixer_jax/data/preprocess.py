"""From an image to the pixels that a model sees.

Images are RGB, [height, width, 3], and stay in 0..255 until they are on the device;
`scale` says what happens to them there.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from mixer_jax.data.randaugment import randaugment

cv2.setNumThreads(0)  # the pipeline already reads several images at once

TRANSFERS = ("uint8", "float32")
EVALUATIONS = ("resize", "resize_then_central_crop", "resize_small_then_central_crop")


Permute = Callable[[np.ndarray], np.ndarray]


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
