import collections

import numpy as np
import pytest
from scipy import stats

from mixer_jax.data import randaugment as ra
from mixer_jax.data.randaugment import OPERATIONS, randaugment


class FixedSign:
    """Stands in for a generator, for operations that draw nothing but a sign."""

    def __init__(self, sign: int):
        self.bit = (1 - sign) // 2

    def integers(self, high: int) -> int:
        assert high == 2
        return self.bit


def random_image(height: int, width: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


GEOMETRY = ["Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"]
POINT = [name for name in OPERATIONS if name not in (*GEOMETRY, "Cutout")]


@pytest.mark.parametrize("magnitude", [5, 10])
@pytest.mark.parametrize("name", POINT)
def test_point_operations_equal_the_original(golden, name, magnitude):
    data = golden.load("randaugment.npz")
    image = data["image"].copy()
    out = OPERATIONS[name](image, FixedSign(1), magnitude / 10)
    np.testing.assert_array_equal(out, data[f"magnitude_{magnitude}/{name}"])
    np.testing.assert_array_equal(image, data["image"])


@pytest.mark.parametrize("magnitude", [5, 10])
@pytest.mark.parametrize(("word", "sign"), [("positive", 1), ("negative", -1)])
@pytest.mark.parametrize("name", GEOMETRY)
def test_geometry_equals_the_original(golden, name, word, sign, magnitude):
    data = golden.load("randaugment.npz")
    out = OPERATIONS[name](data["image"], FixedSign(sign), magnitude / 10)
    want = data[f"magnitude_{magnitude}/{name}_{word}"]
    assert (out == want).all(-1).mean() >= 0.999


def test_operations_and_signs_are_uniform():
    image = random_image(40, 48)
    magnitude, draws = 3, 6400
    names = {}  # what one layer can make of the image, but for Cutout
    for name in OPERATIONS.keys() - {"Cutout"}:
        for sign in (1, -1):
            out = OPERATIONS[name](image, FixedSign(sign), magnitude / 10).tobytes()
            assert names.setdefault(out, (name, sign))[0] == name
    assert len(names) == 15 + len(GEOMETRY)
    rng = np.random.default_rng(0)
    seen = collections.Counter(
        names.get(randaugment(image, rng, 1, magnitude).tobytes(), ("Cutout", 1))
        for _ in range(draws)
    )
    operations = [sum(seen[name, sign] for sign in (1, -1)) for name in OPERATIONS]
    assert len(operations) == 16
    assert stats.chisquare(operations).pvalue > 0.01
    for name in GEOMETRY:
        assert stats.chisquare([seen[name, 1], seen[name, -1]]).pvalue > 0.01


def test_cutout_fills_a_square_about_a_uniform_centre():
    image = np.zeros((20, 30, 3), np.uint8)
    rng = np.random.default_rng(0)
    tops, lefts = [], []
    for _ in range(3000):
        out = OPERATIONS["Cutout"](image, rng, 0.1)  # half a side is 4 pixels
        assert set(np.unique(out)) == {0, 128}
        rows, columns = (out == 128).all(-1).any(1), (out == 128).all(-1).any(0)
        assert (out == 128).sum() == rows.sum() * columns.sum() * 3
        # The edge that no border has cut off tells where the centre was.
        bottom, right = (np.flatnonzero(x)[-1] + 1 for x in (rows, columns))
        tops.append(bottom - 4 if bottom < 20 else np.flatnonzero(rows)[0] + 4)
        lefts.append(right - 4 if right < 30 else np.flatnonzero(columns)[0] + 4)
    assert stats.chisquare(np.bincount(tops, minlength=20)).pvalue > 0.01
    assert stats.chisquare(np.bincount(lefts, minlength=30)).pvalue > 0.01
    np.testing.assert_array_equal(
        np.argwhere(ra.cutout(image, (1, 29), 3)[..., 0] == 128),
        [(y, x) for y in range(4) for x in range(26, 30)],
    )


def test_layers_follow_one_another():
    image = random_image(32, 32)
    once, twice = np.random.default_rng(3), np.random.default_rng(3)
    step_by_step = image
    for _ in range(5):
        step_by_step = randaugment(step_by_step, once, 1, 9)
    np.testing.assert_array_equal(randaugment(image, twice, 5, 9), step_by_step)
    np.testing.assert_array_equal(randaugment(image, twice, 0, 9), image)


@pytest.mark.parametrize("magnitude", [0, 2.5, 15, 20, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_any_magnitude_and_image_size(name, magnitude):
    for height, width in [(1, 1), (2, 7), (33, 5)]:
        image = random_image(height, width)
        out = OPERATIONS[name](image, np.random.default_rng(0), magnitude / 10)
        assert (out.shape, out.dtype) == (image.shape, np.uint8)


def test_a_flipped_view_is_as_good_as_a_copy():
    image = random_image(32, 40)
    for seed in range(40):
        view, copy = (
            randaugment(x, np.random.default_rng(seed), 2, 10)
            for x in (image[:, ::-1], image[:, ::-1].copy())
        )
        np.testing.assert_array_equal(view, copy)


def test_the_scales_of_pre_training():
    """Magnitude 15, on ImageNet, at 224 pixels."""
    image = random_image(224, 224)
    rng = np.random.default_rng(0)
    apply = lambda name: OPERATIONS[name](image, rng, 1.5)
    # Contrast blends with 224 * 224 / 256 = 196; the factor is 1.8 * 1.5 + 0.1.
    contrast = np.clip(196 + 2.8 * (image - 196.0), 0, 255)
    assert np.abs(apply("Contrast") - contrast).max() <= 1
    np.testing.assert_array_equal(apply("Posterize"), image // 4 * 4)
    np.testing.assert_array_equal(apply("Solarize"), image)
    np.testing.assert_array_equal(
        apply("SolarizeAdd"),
        np.where(image < 128, np.minimum(image.astype(int) + 165, 255), image),
    )
    # 150 pixels to the left or to the right.
    filled = (apply("TranslateX") == 128).all((0, 2))
    assert filled.sum() == 150
    assert filled[:150].all() or filled[-150:].all()


def test_sharpness_keeps_flat_images_and_borders():
    flat = np.full((9, 9, 3), 77, np.uint8)
    assert np.abs(ra.sharpness(flat, 1.9).astype(int) - 77).max() <= 1
    image = random_image(9, 12)
    out = ra.sharpness(image, 2.8)
    assert (out != image)[1:-1, 1:-1].mean() > 0.5
    out[1:-1, 1:-1] = image[1:-1, 1:-1]
    np.testing.assert_array_equal(out, image)


def test_auto_contrast_and_equalize_work_on_each_channel():
    image = random_image(32, 32)
    image[..., 0] = 100  # nothing to stretch
    image[..., 1] = 50 + image[..., 1] // 4
    for operation in (ra.auto_contrast, ra.equalize):
        out = operation(image)
        np.testing.assert_array_equal(out[..., 0], image[..., 0])
        assert out[..., 1].min() == 0
        assert out[..., 1].max() >= 254
        one = operation(np.repeat(image[..., 1:2], 3, axis=2))
        np.testing.assert_array_equal(one, np.repeat(out[..., 1:2], 3, axis=2))


@pytest.mark.parametrize("shape", [(8, 8), (8, 8, 1), (2, 8, 8, 3)])
def test_images_of_another_shape(shape):
    with pytest.raises(ValueError, match=r"\[height, width, 3\] in uint8"):
        randaugment(np.zeros(shape, np.uint8), np.random.default_rng(0), 2, 10)


def test_images_of_another_type_and_negative_settings():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="float32"):
        randaugment(np.zeros((8, 8, 3), np.float32), rng, 2, 10)
    for num_layers, magnitude in [(-1, 10), (2, -10)]:
        with pytest.raises(ValueError, match="negative"):
            randaugment(random_image(8, 8), rng, num_layers, magnitude)
