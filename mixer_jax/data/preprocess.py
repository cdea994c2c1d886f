"""From an image to the pixels that a model sees.

Images are RGB, [height, width, 3], with values in 0..255. `scale` maps these to
[-1, 1]; this happens on the device, unless pp.transfer is float32.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import cv2
import numpy as np

from mixer_jax.data.randaugment import randaugment

cv2.setNumThreads(0)  # the pipeline already reads several images at once

Permute = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random crop, resize, random flip, RandAugment, in this order.

    vit_jax fine-tunes with the first three, big_vision pre-trains with all.

    Attributes:
      crop: side of the result, in pixels.
      area_range: see `sample_inception_crop`.
      aspect_range: see `sample_inception_crop`.
      flip: whether to mirror half of the images, drawn at random, left to right.
      transfer: one of TRANSFERS.
      randaugment: (layers, magnitude), see `mixer_jax.data.randaugment`; with 0 layers
        it is not applied.
      permute: the last change, the same for all images; see `mixer_jax.data.permute`.
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
        if self.permute:
            image = self.permute(image)
        return TRANSFERS[self.transfer](image)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """What becomes of an image in evaluation and prediction.

    Attributes:
      crop: side of the result, in pixels.
      evaluation: one of EVALUATIONS.
      resize: size before a central crop, in pixels; see `evaluation`.
      transfer: one of TRANSFERS.
      permute: see TrainTransform.
    """

    crop: int
    evaluation: str = "resize"
    resize: int = 256
    transfer: str = "uint8"
    permute: Permute | None = None

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Returns [crop, crop, 3] for uint8 [h, w, 3]."""
        image = EVALUATIONS[self.evaluation].cut(image, self.crop, self.resize)
        if self.permute:
            image = self.permute(image)
        return TRANSFERS[self.transfer](image)

    @property
    def steps(self) -> str:
        """What `evaluation` does to an image, in words."""
        steps = EVALUATIONS[self.evaluation].steps
        return steps.format(crop=self.crop, resize=self.resize)


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


def central_crop(image: np.ndarray, size: int) -> np.ndarray:
    """Cuts the central [size, size, 3] out of [h, w, 3].

    Raises:
      ValueError: the image is smaller than that.
    """
    height, width = image.shape[:2]
    top, left = _central_corner(height, width, size)
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
    ratio and the area range allow. So small crops are more common than if the area
    were drawn, as in torchvision and timm.

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


def resize_then_central_crop(image: np.ndarray, crop: int, size: int) -> np.ndarray:
    """Resizes to size x size pixels, then cuts out the central crop x crop."""
    return central_crop(resize(image, size, size), crop)


def resize_small_then_central_crop(
    image: np.ndarray, crop: int, size: int
) -> np.ndarray:
    """Resizes by area so that the short side has `size` pixels, then cuts the centre.

    Args:
      image: uint8 [h, w, 3].
      crop: side of the result in pixels.
      size: length of the short side before the crop, in pixels.

    Returns:
      float32 [crop, crop, 3] of whole numbers: big_vision rounds down to uint8.

    Raises:
      ValueError: size is smaller than crop.
    """
    ratio = size / min(image.shape[:2])
    height, width = (round(side * ratio) for side in image.shape[:2])
    if ratio > 1:
        return np.floor(_enlarged_crop(image, height, width, crop))
    resized = cv2.resize(
        image.astype(np.float32), (width, height), interpolation=cv2.INTER_AREA
    )
    return np.floor(central_crop(resized, crop))


class Evaluation(NamedTuple):
    """A way to cut any image to the size that a model takes.

    Attributes:
      cut: makes float32 [crop, crop, 3] of (image, crop, resize): uint8 [h, w, 3] and
        two lengths in pixels.
      steps: what `cut` does, with {crop} and {resize}, for those who must do the same
        without this package.
    """

    cut: Callable[[np.ndarray, int, int], np.ndarray]
    steps: str


_BILINEAR = "bilinear, half-pixel centres, no antialiasing"

# The choices for pp.evaluation: vit_jax's, the paper's, and the paper's and
# big_vision's.
EVALUATIONS = {
    "resize": Evaluation(
        lambda image, crop, _: resize(image, crop, crop),
        f"resize to {{crop}}x{{crop}}; {_BILINEAR}",
    ),
    "resize_then_central_crop": Evaluation(
        resize_then_central_crop,
        "resize to {resize}x{resize}, crop the central {crop}x{crop}; " + _BILINEAR,
    ),
    "resize_small_then_central_crop": Evaluation(
        resize_small_then_central_crop,
        "resize by area so that the short side has {resize} pixels, round down, crop "
        "the central {crop}x{crop}",
    ),
}

# The choices for pp.transfer: what is sent to the device for float32 values in 0..255.
TRANSFERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    # Rounded to the nearest level: a quarter of the bytes.
    "uint8": lambda image: np.rint(image).astype(np.uint8),
    # The exact values of the original, already in [-1, 1].
    "float32": scale,
}


def _enlarged_crop(image: np.ndarray, height: int, width: int, crop: int) -> np.ndarray:
    """Returns the central crop of an image that is enlarged to height x width by area.

    OpenCV averages areas only when it shrinks an image. This gives, to the bit, what
    OpenCV makes of an image in which each pixel is repeated in both directions so that
    it must be shrunk. Only the crop is computed, since the rest may not fit in memory:
    a 1 x 40,000 image whose short side becomes 256 has ten million columns.
    """
    factor = math.ceil(min(height, width) / min(image.shape[:2]))
    top, left = _central_corner(height, width, crop)
    rows, row_weights = _area_weights(image.shape[0], factor, height, top, crop)
    columns, column_weights = _area_weights(image.shape[1], factor, width, left, crop)
    strip = image[rows.min() : rows.max() + 1].astype(np.float32)
    strip = np.einsum("hnwc,nw->hwc", strip.take(columns, axis=1), column_weights)
    strip = strip.take(rows - rows.min(), axis=0)
    return np.einsum("nhwc,nh->hwc", strip, row_weights)


def _area_weights(
    length: int, factor: int, size: int, start: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns which pixels an output pixel is the mean of, along one axis.

    Args:
      length: of the source in pixels, each of which is repeated `factor` times.
      factor: so large that length * factor is 1 to 2 times `size`.
      size: of the whole output in pixels.
      start: the first output pixel wanted.
      count: the number of output pixels wanted.

    Returns:
      Their positions in the source, int [n, count], and weights, float32 [n, count].
    """
    scale = length * factor / size
    begin = np.arange(start, start + count) * scale
    end = begin + scale
    cells = np.floor(begin) + np.arange(3)[:, None]  # less than 2 wide: at most 3 cells
    overlap = np.minimum(end, cells + 1) - np.maximum(begin, cells)
    overlap[overlap < 1e-3] = 0  # as OpenCV does
    used = overlap.any(axis=1)  # with a scale of 1, one cell
    positions = np.minimum(cells[used], length * factor - 1).astype(int) // factor
    return positions, (overlap[used] / scale).astype(np.float32)


def _central_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """Returns top and left of the central size x size pixels."""
    if min(height, width) < size:
        raise ValueError(
            f"Cannot crop {size}x{size} pixels out of {height}x{width}. Make pp.resize "
            f"at least pp.crop, which is {size}."
        )
    return (height - size) // 2, (width - size) // 2
