"""The ways to cut an image of any shape to the size that a model takes."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from mixer_jax.data.interpolate import Window
from mixer_jax.data.sizes import Size, covers, size_text

# Gives the image, resized to (height, width), or a window of that; float32.
Resample = Callable[..., np.ndarray]


class Evaluation(NamedTuple):
    """A way to cut any image to the size that a model takes.

    Attributes:
      cut: makes float32 [*crop, 3] of (shape, crop, resize, resample): three sizes
        (height, width) in pixels, the first that of the image, and a function. That is
        `resample(size, window=None)` of `mixer_jax.data.interpolate`, which knows the
        image and the interpolation.
      interpolation: the usual one.
      steps: what `cut` does, with {crop} and {resize}, for those who must do the same
        without this package.
    """

    cut: Callable[[Size, Size, Size, Resample], np.ndarray]
    interpolation: str
    steps: str


def _resize(_: Size, crop: Size, resize: Size, resample: Resample) -> np.ndarray:
    del resize
    return resample(crop)


def _resize_then_central_crop(
    _: Size, crop: Size, resize: Size, resample: Resample
) -> np.ndarray:
    top, left, height, width = _central_window(resize, crop)
    return resample(resize)[top : top + height, left : left + width]


def _resize_small_then_central_crop(
    shape: Size, crop: Size, resize: Size, resample: Resample
) -> np.ndarray:
    ratio = max(new / old for new, old in zip(resize, shape, strict=True))
    height, width = (round(side * ratio) for side in shape)
    window = _central_window((height, width), crop)
    # big_vision rounds down to uint8.
    return np.floor(resample((height, width), window))


def _torchvision(
    shape: Size, crop: Size, resize: Size, resample: Resample
) -> np.ndarray:
    if resize[0] == resize[1]:
        height, width = (int(resize[0] * side / min(shape)) for side in shape)
    else:  # torchvision knows the short side only; this is timm's
        ratio = min(a / b for a, b in zip(shape, resize, strict=True))
        height, width = (round(side / ratio) for side in shape)
    window = _torchvision_window((height, width), crop)
    return np.rint(resample((height, width), window))


def _squash(_: Size, crop: Size, resize: Size, resample: Resample) -> np.ndarray:
    return np.rint(resample(resize, _torchvision_window(resize, crop)))


def _central_window(size: Size, crop: Size) -> Window:
    """Returns the central `crop` pixels of an image of `size` pixels."""
    if not covers(size, crop):
        raise ValueError(
            f"Cannot crop {size_text(crop)} pixels out of {size_text(size)}. Make "
            f"pp.resize at least pp.crop, which is {size_text(crop)}."
        )
    return (size[0] - crop[0]) // 2, (size[1] - crop[1]) // 2, *crop


def _torchvision_window(size: Size, crop: Size) -> Window:
    """Returns the central window as torchvision's CenterCrop rounds it."""
    top, left = (round((a - b) / 2) for a, b in zip(size, crop, strict=True))
    return top, left, *crop


# The choices for pp.evaluation: vit_jax's, the paper's, the paper's and big_vision's,
# torchvision's, with which timm scores too, and the other one that timm has.
EVALUATIONS = {
    "resize": Evaluation(_resize, "bilinear", "resize to {crop}"),
    "resize_then_central_crop": Evaluation(
        _resize_then_central_crop,
        "bilinear",
        "resize to {resize}, crop the central {crop}",
    ),
    "resize_small_then_central_crop": Evaluation(
        _resize_small_then_central_crop,
        "area",
        "resize so that the image just covers {resize}, keeping its shape; round down; "
        "crop the central {crop}",
    ),
    "torchvision": Evaluation(
        _torchvision,
        "pil_bilinear",
        "resize so that the image just covers {resize}, keeping its shape, the longer "
        "side rounded down; round; crop the central {crop}",
    ),
    "squash": Evaluation(
        _squash,
        "pil_bilinear",
        "resize to {resize}; round; crop the central {crop}, half a pixel rounded to "
        "even",
    ),
}
