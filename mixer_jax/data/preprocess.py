"""From an image to the pixels that a model sees.

Images are RGB, [height, width, 3], with values in 0..255. `scale` maps these to what
the model takes, [-1, 1] with the usual mean and standard deviation; this happens on the
device, unless pp.transfer is float32.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import cv2
import numpy as np

from mixer_jax.data.evaluations import EVALUATIONS
from mixer_jax.data.interpolate import INTERPOLATIONS, Window, resample
from mixer_jax.data.jpeg import Jpeg, Pixels, part_of, reduction
from mixer_jax.data.randaugment import randaugment
from mixer_jax.data.sizes import Size, as_size, size_text

Permute = Callable[[np.ndarray], np.ndarray]
Color = tuple[float, float, float]  # red, green and blue, from 0 to 1

HALF: Color = (0.5, 0.5, 0.5)


@dataclasses.dataclass(frozen=True)
class TrainTransform:
    """Random crop, resize, random flip, RandAugment, in this order.

    vit_jax fine-tunes with the first three, big_vision pre-trains with all.

    Attributes:
      crop: (height, width) of the result in pixels; one number stands for both.
      area_range: see `sample_inception_crop`.
      aspect_range: see `sample_inception_crop`.
      flip: whether to mirror half of the images, drawn at random, left to right.
      transfer: one of TRANSFERS.
      randaugment: (layers, magnitude), see `mixer_jax.data.randaugment`; with 0 layers
        it is not applied.
      permute: the last change, the same for all images; see `mixer_jax.data.permute`.
      interpolation: of the resize, one of `mixer_jax.data.interpolate.INTERPOLATIONS`;
        None for bilinear.
      mean: see EvalTransform.
      std: see EvalTransform.
    """

    crop: Size
    area_range: tuple[float, float] = (0.05, 1.0)
    aspect_range: tuple[float, float] = (0.75, 1.33)
    flip: bool = True
    transfer: str = "uint8"
    randaugment: tuple[int, float] = (0, 0.0)
    permute: Permute | None = None
    interpolation: str | None = None
    mean: Color = HALF
    std: Color = HALF

    def __post_init__(self) -> None:
        _set(self, crop=as_size(self.crop))
        _set(self, mean=as_color(self.mean), std=as_color(self.std))

    def __call__(self, image: Pixels, rng: np.random.Generator) -> np.ndarray:
        """Returns [*crop, 3] for uint8 [h, w, 3], or for a JPEG file.

        Raises:
          ImageError: the JPEG file cannot be decoded.
        """
        height, width = image.shape[:2]
        window = sample_inception_crop(
            rng, height, width, self.area_range, self.aspect_range
        )
        part = part_of(image, window)
        interpolation = self.interpolation or "bilinear"
        layers, magnitude = self.randaugment
        crop: np.ndarray
        if layers:
            # big_vision rounds down here.
            crop = resample(part, self.crop, interpolation).astype(np.uint8)
        elif isinstance(image, Jpeg) and (self.transfer, interpolation) == (
            "uint8",
            "bilinear",
        ):
            # At most one level from the exact values, in two thirds of the time.
            crop = cv2.resize(part, self.crop[::-1], interpolation=cv2.INTER_LINEAR)
        else:
            crop = self._transfer(resample(part, self.crop, interpolation))
        if self.flip and rng.random() < 0.5:
            crop = cv2.flip(crop, 1)
        if layers:
            crop = self._transfer(randaugment(crop, rng, layers, magnitude))
        return self.permute(crop) if self.permute else crop

    def _transfer(self, image: np.ndarray) -> np.ndarray:
        return TRANSFERS[self.transfer](image, self.mean, self.std)


@dataclasses.dataclass(frozen=True)
class EvalTransform:
    """What becomes of an image in evaluation and prediction: what a model takes.

    Attributes:
      crop: (height, width) of the result in pixels; one number stands for both.
      evaluation: one of `mixer_jax.data.evaluations.EVALUATIONS`.
      resize: (height, width) before a central crop, in pixels; one number stands for
        both. See `evaluation`.
      transfer: one of TRANSFERS.
      permute: see TrainTransform.
      interpolation: of the resize, one of `mixer_jax.data.interpolate.INTERPOLATIONS`;
        None for the one that is usual for `evaluation`, see `used_interpolation`.
      mean: of red, green and blue, in units of [0, 1]; one number stands for all three.
        The model takes (pixel / 255 - mean) / std.
      std: the standard deviation in the same way.
    """

    crop: Size
    evaluation: str = "resize"
    resize: Size = (256, 256)
    transfer: str = "uint8"
    permute: Permute | None = None
    interpolation: str | None = None
    mean: Color = HALF
    std: Color = HALF

    def __post_init__(self) -> None:
        _set(self, crop=as_size(self.crop), resize=as_size(self.resize))
        _set(self, mean=as_color(self.mean), std=as_color(self.std))

    def __call__(self, image: Pixels) -> np.ndarray:
        """Returns [*crop, 3] for uint8 [h, w, 3], or for a JPEG file.

        Raises:
          ImageError: the JPEG file cannot be decoded.
        """
        height, width = image.shape[:2]
        cut = EVALUATIONS[self.evaluation].cut
        resized = functools.partial(self._resample, image)
        crop = cut((height, width), self.crop, self.resize, resized)
        crop = TRANSFERS[self.transfer](crop, self.mean, self.std)
        return self.permute(crop) if self.permute else crop

    def _resample(
        self, image: Pixels, size: Size, window: Window | None = None
    ) -> np.ndarray:
        if isinstance(image, Jpeg):
            averages = INTERPOLATIONS[self.used_interpolation].averages
            factor = 1
            if averages and self.transfer == "uint8":
                factor = reduction(image.shape, size)
            image = image.shrunk(factor)
        return resample(image, size, self.used_interpolation, window)

    @property
    def used_interpolation(self) -> str:
        """The interpolation that is used, a key of INTERPOLATIONS."""
        return self.interpolation or EVALUATIONS[self.evaluation].interpolation

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields that say how to make images elsewhere; fit for JSON."""
        fields = ("evaluation", "crop", "resize", "mean", "std")
        interpolation = {"interpolation": self.used_interpolation}
        return {name: getattr(self, name) for name in fields} | interpolation

    @property
    def steps(self) -> str:
        """What `evaluation` does to an image, in words."""
        crop, resize = size_text(self.crop), size_text(self.resize)
        how = INTERPOLATIONS[self.used_interpolation].equals
        steps = EVALUATIONS[self.evaluation].steps.format(crop=crop, resize=resize)
        return f"{steps}. Resizing equals {how}"


def as_color(value: float | Sequence[float]) -> Color:
    """Returns three numbers for three or for one that stands for all."""
    if isinstance(value, int | float):
        value = (value, value, value)
    red, green, blue = map(float, value)
    return red, green, blue


def _set(transform: Any, **fields: Any) -> None:
    for name, value in fields.items():
        object.__setattr__(transform, name, value)  # it is frozen


def scale(images: Any, mean: Color = HALF, std: Color = HALF) -> Any:
    """Maps 0..255 to what a model takes, as float32: to [-1, 1] by default.

    Args:
      images: NumPy or JAX array [..., 3].
      mean: of red, green and blue, in units of [0, 1].
      std: their standard deviations.
    """
    axes = (1,) * (images.ndim - 1) + (3,)
    offset, width = (
        # One number where the three are equal: the arithmetic of the original.
        255 * x[0]
        if len(set(x)) == 1
        else np.array([255 * value for value in x], np.float32).reshape(axes)
        for x in (mean, std)
    )
    return (images.astype(np.float32) - offset) / width


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


# The choices for pp.transfer: what is sent to the device for float32 values in 0..255
# and the mean and standard deviation.
TRANSFERS: dict[str, Callable[[np.ndarray, Color, Color], np.ndarray]] = {
    # Rounded to the nearest level: a quarter of the bytes.
    "uint8": lambda image, mean, std: cv2.convertScaleAbs(image),
    # Not rounded, and scaled here: by default the exact values of the original.
    "float32": scale,
}
