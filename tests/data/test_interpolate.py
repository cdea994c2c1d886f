import math

import numpy as np
import pytest
from PIL import Image

from mixer_jax.data import interpolate
from mixer_jax.data.interpolate import INTERPOLATIONS, resample

SHAPES = [(50, 70), (70, 50), (33, 33), (1, 9), (7, 1), (120, 200), (100, 20)]


@pytest.fixture(params=SHAPES, ids=str)
def image(request):
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (*request.param, 3), np.uint8)
    image[: len(image) // 2] //= 128  # half of it nearly flat
    return image


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (90, 130), (33, 33)])
@pytest.mark.parametrize("name", ["pil_bilinear", "pil_bicubic"])
def test_pil(image, name, size):
    method = {"pil_bilinear": Image.BILINEAR, "pil_bicubic": Image.BICUBIC}[name]
    want = np.asarray(Image.fromarray(image).resize(size[::-1], method))
    found = resample(image, size, name)
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, want)


def along_one_axis(image, size, kernel, radius):
    """Rows at half-pixel centres; beyond the border the last row goes on."""
    length = len(image)
    rows = []
    for i in range(size):
        centre = (i + 0.5) * length / size - 0.5
        first = math.floor(centre) - radius + 1
        taps = range(first, first + 2 * radius)
        rows.append(
            sum(
                kernel(abs(j - centre)) * image[min(max(j, 0), length - 1)]
                for j in taps
            )
        )
    return np.array(rows)


def linear(x):
    return max(1 - x, 0)


def cubic(x, a=-0.75):
    """The parameter of PyTorch and OpenCV. TensorFlow, JAX and PIL have -0.5."""
    if x <= 1:
        return (a + 2) * x**3 - (a + 3) * x**2 + 1
    return a * x**3 - 5 * a * x**2 + 8 * a * x - 4 * a if x < 2 else 0


def mean_of_area(image, size):
    """Each row is the mean of the rows that it covers, the outer ones in part."""
    length = len(image)
    edges = np.arange(size + 1) * length / size
    overlap = np.minimum(edges[1:, None], np.arange(length) + 1) - np.maximum(
        edges[:-1, None], np.arange(length)
    )
    weights = np.maximum(overlap, 0) * size / length
    return np.tensordot(weights, image, 1)


AXIS = {
    "bilinear": lambda image, size: along_one_axis(image, size, linear, 1),
    "bicubic": lambda image, size: along_one_axis(image, size, cubic, 2),
    "area": mean_of_area,
}


@pytest.mark.parametrize("size", [(32, 32), (64, 40), (90, 130)])
@pytest.mark.parametrize("name", AXIS)
def test_the_others_are_as_defined(image, name, size):
    """PyTorch's bicubic, PyTorch's and TensorFlow's bilinear, TensorFlow's area."""
    rows = AXIS[name](image.astype(float), size[0])
    want = AXIS[name](rows.swapaxes(0, 1), size[1]).swapaxes(0, 1)
    found = resample(image, size, name)
    np.testing.assert_allclose(found, want.clip(0, 255), atol=0.02, rtol=0)


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_a_window_is_cut_out_of_the_whole(name, monkeypatch):
    """Also if no more than the window is computed; but for OpenCV's, to the bit."""
    rng = np.random.default_rng(0)
    for _ in range(40):
        shape = rng.integers(1, 60, 2)
        image = rng.integers(0, 4, (*shape, 3), np.uint8) * 85
        height, width = (int(x) for x in shape + rng.integers(1, 200, 2))
        h, w = int(rng.integers(1, height + 1)), int(rng.integers(1, width + 1))
        top = int(rng.integers(height - h + 1))
        left = int(rng.integers(width - w + 1))
        whole = resample(image, (height, width), name)
        want = whole[top : top + h, left : left + w]
        tolerance = 0.005 if name in ("bilinear", "bicubic") else 0
        for limit in (10**9, 0):
            monkeypatch.setattr(interpolate, "MAX_PIXELS", limit)
            found = resample(image, (height, width), name, (top, left, h, w))
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, want, atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", INTERPOLATIONS)
def test_values_stay_those_of_pixels(name):
    image = np.random.default_rng(0).integers(0, 2, (9, 9, 3), np.uint8) * 255
    resized = resample(image, (40, 25), name)
    assert resized.min() >= -1e-3
    assert resized.max() <= 255 + 1e-3
    same = resample(image, (9, 9), name)
    np.testing.assert_array_equal(same, image)
