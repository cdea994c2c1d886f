"""RandAugment (Cubuk et al., 2019, https://arxiv.org/abs/1909.13719) on uint8 images.

The sixteen operations give the results of big_vision's archived TensorFlow version,
with which Mixer was pre-trained, except `solarize` from magnitude 10 on; see there. So
values are truncated to uint8 and never rounded, images are blended in float32, and the
pixels that a rotation or translation leaves empty are filled with 128.
"""

import math
from collections.abc import Callable

import cv2
import numpy as np

FILL = 128
VALUES = np.arange(256, dtype=np.uint8)
LUMA = np.array([[0.2989, 0.5870, 0.1140]], np.float32)
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def randaugment(
    image: np.ndarray, rng: np.random.Generator, num_layers: int, magnitude: float
) -> np.ndarray:
    """Applies `num_layers` operations, each drawn uniformly from OPERATIONS.

    Args:
      image: [height, width, 3], uint8, RGB. It is not changed.
      rng: draws the operations, their signs and the centre of Cutout.
      num_layers: operations to apply one after the other; the paper's N.
      magnitude: their strength, the paper's M. 10 is the nominal maximum, but more is
        allowed: Mixer was pre-trained with 2 layers of 10, 15 or 20.

    Returns:
      [height, width, 3], uint8.

    Raises:
      ValueError: the image is not [height, width, 3] in uint8, or the number of layers
        or the magnitude is negative.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(
            f"RandAugment got an image of shape {image.shape} and type {image.dtype}, "
            "but works on [height, width, 3] in uint8. Apply it before images are "
            "scaled and batched, and give grayscale images three channels."
        )
    if num_layers < 0 or magnitude < 0:
        raise ValueError(
            f"RandAugment got num_layers={num_layers} and magnitude={magnitude}; "
            "neither may be negative."
        )
    image = np.ascontiguousarray(image)  # copies a flipped view once, not in each layer
    names = list(OPERATIONS)
    for _ in range(num_layers):
        image = OPERATIONS[names[rng.integers(len(names))]](image, rng, magnitude / 10)
    return image


def auto_contrast(image: np.ndarray) -> np.ndarray:
    """Stretches each channel of [height, width, 3] to the whole range 0 to 255."""
    low = image.min(0).min(0).astype(np.float32)  # 50 times as fast as min((0, 1))
    high = image.max(0).max(0).astype(np.float32)
    flat = high == low  # such a channel stays as it is
    scale = np.float32(255) / np.where(flat, 255, high - low)
    table = VALUES[:, None] * scale - np.where(flat, 0, low * scale)
    return _look_up(image, np.clip(table, 0, 255).astype(np.uint8))


def equalize(image: np.ndarray) -> np.ndarray:
    """Evens out each channel's histogram, as PIL does; [height, width, 3]."""
    tables = np.empty((256, 3), np.uint8)
    for channel in range(3):
        histogram = cv2.calcHist([image], [channel], None, [256], [0, 256])
        counts = histogram.ravel().astype(np.int64)
        step = (counts.sum() - counts[counts > 0][-1]) // 255
        if step == 0:  # hardly any pixels, or hardly any values
            tables[:, channel] = VALUES
        else:
            below = np.cumsum(counts) - counts
            tables[:, channel] = np.clip((below + step // 2) // step, 0, 255)
    return _look_up(image, tables)


def invert(image: np.ndarray) -> np.ndarray:
    """Returns the negative of the image."""
    return 255 - image


def posterize(image: np.ndarray, bits: int) -> np.ndarray:
    """Keeps the `bits` highest bits of each value, at least one."""
    shift = min(max(8 - bits, 0), 7)  # TensorFlow shifts by no more than 7
    return image >> shift << shift


def solarize(image: np.ndarray, threshold: int) -> np.ndarray:
    """Inverts the values of at least `threshold`; none if it is above 255.

    In the TensorFlow of that time a threshold above 255, from magnitude 10 on, wrapped
    around in uint8, so that 256 inverted the whole image. tests/golden/ has the results
    without that.
    """
    return _look_up(image, np.where(np.less(VALUES, threshold), VALUES, 255 - VALUES))


def solarize_add(image: np.ndarray, addition: int) -> np.ndarray:
    """Adds `addition` to the values below 128, and clips the sums to 255."""
    brighter = np.minimum(VALUES.astype(int) + addition, 255).astype(np.uint8)
    return _look_up(image, np.where(np.less(VALUES, 128), brighter, VALUES))


def color(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends the gray image (factor 0) and the image (1); above 1 it extrapolates."""
    # 1/255 and 255.5 are those of tf.image.convert_image_dtype.
    gray = cv2.transform(image * np.float32(1 / 255), LUMA) * np.float32(255.5)
    return _blend(
        cv2.cvtColor(gray.astype(np.uint8), cv2.COLOR_GRAY2RGB), image, factor
    )


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends a constant (factor 0) and the image (1); above 1 it extrapolates.

    The constant is not the mean gray but the number of pixels / 256, at most 255, since
    the original divides the sum of the histogram by its number of bins. The published
    Mixers were trained with that.
    """
    height, width = image.shape[:2]
    constant = min(255, height * width // 256)
    return _look_up(image, _blend(np.full_like(VALUES, constant), VALUES, factor))


def brightness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends black (factor 0) and the image (1); above 1 it extrapolates."""
    return _look_up(image, _blend(np.zeros_like(VALUES), VALUES, factor))


def sharpness(image: np.ndarray, factor: float) -> np.ndarray:
    """Blends a smoothed image (factor 0) and the image (1); above 1 it extrapolates.

    The outermost pixels do not have all neighbours and stay as they are.
    """
    # If the weighted mean is a whole number, float32 rounding decides what truncation
    # makes of it. OpenCV adds in TensorFlow's order, row by row in fused multiply-adds,
    # except for a few pixels on the right, and on processors without such instructions.
    smooth = cv2.filter2D(image.astype(np.float32), cv2.CV_32F, SMOOTH).astype(np.uint8)
    result = _blend(smooth, image, factor)
    for border in (np.s_[:1], np.s_[-1:], np.s_[:, :1], np.s_[:, -1:]):
        result[border] = image[border]
    return result


def rotate(image: np.ndarray, degrees: float) -> np.ndarray:
    """Rotates about the centre, counterclockwise for positive degrees."""
    angle = np.float32(degrees * (math.pi / 180))
    cos, sin = np.cos(angle), np.sin(angle)
    x, y = np.float32(image.shape[1] - 1), np.float32(image.shape[0] - 1)
    to_x = (x - (cos * x - sin * y)) / 2
    to_y = (y - (sin * x + cos * y)) / 2
    return _transform(image, (cos, -sin, to_x), (sin, cos, to_y))


def shear_x(image: np.ndarray, level: float) -> np.ndarray:
    """Moves each row left by `level` pixels per row from the top."""
    return _transform(image, (1, level, 0), (0, 1, 0))


def shear_y(image: np.ndarray, level: float) -> np.ndarray:
    """Moves each column up by `level` pixels per column from the left."""
    return _transform(image, (1, 0, 0), (level, 1, 0))


def translate_x(image: np.ndarray, pixels: float) -> np.ndarray:
    """Moves the image left by `pixels`."""
    return _transform(image, (1, 0, pixels), (0, 1, 0))


def translate_y(image: np.ndarray, pixels: float) -> np.ndarray:
    """Moves the image up by `pixels`."""
    return _transform(image, (1, 0, 0), (0, 1, pixels))


def cutout(image: np.ndarray, center: tuple[int, int], half_size: int) -> np.ndarray:
    """Fills a square of side 2 * half_size around `center`, (y, x), with 128."""
    top, left = (max(c - half_size, 0) for c in center)
    result = image.copy()
    result[top : center[0] + half_size, left : center[1] + half_size] = FILL
    return result


def _enhance(level: float) -> float:
    return 1.8 * level + 0.1


def _sign(rng: np.random.Generator) -> int:
    return 1 - 2 * int(rng.integers(2))


def _center(image: np.ndarray, rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(image.shape[0])), int(rng.integers(image.shape[1]))


# The operations: functions of (image, generator, level), with level = magnitude / 10.
OPERATIONS: dict[
    str, Callable[[np.ndarray, np.random.Generator, float], np.ndarray]
] = {
    "AutoContrast": lambda image, rng, level: auto_contrast(image),
    "Equalize": lambda image, rng, level: equalize(image),
    "Invert": lambda image, rng, level: invert(image),
    "Rotate": lambda image, rng, level: rotate(image, _sign(rng) * 30 * level),
    "Posterize": lambda image, rng, level: posterize(image, int(4 * level)),
    "Solarize": lambda image, rng, level: solarize(image, int(256 * level)),
    "Color": lambda image, rng, level: color(image, _enhance(level)),
    "Contrast": lambda image, rng, level: contrast(image, _enhance(level)),
    "Brightness": lambda image, rng, level: brightness(image, _enhance(level)),
    "Sharpness": lambda image, rng, level: sharpness(image, _enhance(level)),
    "ShearX": lambda image, rng, level: shear_x(image, _sign(rng) * 0.3 * level),
    "ShearY": lambda image, rng, level: shear_y(image, _sign(rng) * 0.3 * level),
    "TranslateX": lambda image, rng, level: translate_x(
        image, _sign(rng) * 100 * level
    ),
    "TranslateY": lambda image, rng, level: translate_y(
        image, _sign(rng) * 100 * level
    ),
    "Cutout": lambda image, rng, level: cutout(
        image, _center(image, rng), int(40 * level)
    ),
    "SolarizeAdd": lambda image, rng, level: solarize_add(image, int(110 * level)),
}


def _look_up(image: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Replaces each value by that of a table, [256] or for each channel [256, 3]."""
    return cv2.LUT(image, table.reshape(256, 1, -1))


def _blend(start: np.ndarray, end: np.ndarray, factor: float) -> np.ndarray:
    """Returns start + factor * (end - start), clipped, in uint8."""
    blended = end.astype(np.float32)
    blended -= start  # in place: a new array takes longer than the arithmetic
    blended *= np.float32(factor)
    blended += start
    return np.clip(blended, 0, 255, out=blended).astype(np.uint8)


def _transform(
    image: np.ndarray,
    row_x: tuple[float, float, float],
    row_y: tuple[float, float, float],
) -> np.ndarray:
    """Takes output pixel (x, y) from (row_x · (x, y, 1), row_y · (x, y, 1)).

    The position is rounded to the nearest pixel, halves away from zero; outside of the
    image the value is 128. OpenCV's warpAffine works in fixed point and rounds
    differently.
    """
    height, width = image.shape[:2]
    x = np.arange(width, dtype=np.float32)
    y = np.arange(height, dtype=np.float32)[:, None]
    source = np.empty((height, width, 2), np.int16)
    for axis, (a, b, c) in enumerate((row_x, row_y)):
        exact = np.float32(a) * x + np.float32(b) * y + np.float32(c)
        source[..., axis] = exact + np.copysign(np.float32(0.5), exact)  # and truncate
    return cv2.remap(
        image,
        source,
        np.empty(0),  # no second map
        cv2.INTER_NEAREST,
        borderMode=cv2.BORDER_CONSTANT,
        borderValue=(FILL,) * 3,
    )
