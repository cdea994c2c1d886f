import math
import subprocess
import sys

import cv2
import numpy as np
import pytest
from PIL import Image
from scipy import stats

from mixer_jax.data import evaluations, preprocess
from mixer_jax.data.interpolate import INTERPOLATIONS, resample

IMAGES = range(4)


@pytest.mark.parametrize(
    ("evaluation", "tolerance"),
    [
        ("resize", 1e-5),
        ("resize_then_central_crop", 1e-5),
        ("resize_small_then_central_crop", 2.0001 / 255),
    ],
)
@pytest.mark.parametrize("i", IMAGES)
def test_evaluation_equals_the_original(golden, evaluation, tolerance, i):
    data = golden.load("preprocess.npz")
    kwargs = {"crop": 32, "evaluation": evaluation, "resize": 40}
    want = data[f"{evaluation}_{i}"]
    exact = preprocess.EvalTransform(**kwargs, transfer="float32")(data[f"image_{i}"])
    np.testing.assert_allclose(exact, want, atol=tolerance, rtol=0)
    # As uint8 the same, rounded to the nearest of 256 levels.
    rounded = preprocess.EvalTransform(**kwargs)(data[f"image_{i}"])
    assert rounded.dtype == np.uint8
    np.testing.assert_allclose(
        preprocess.scale(rounded), exact, atol=1 / 255 + 1e-6, rtol=0
    )


def crop_features(crops, height, width):
    top, left, h, w = np.asarray(crops, np.float64).T
    return {
        "area": h * w / (height * width),
        "ratio": w / h,
        "centre y": top + h / 2,
        "centre x": left + w / 2,
    }


@pytest.mark.parametrize("size", ["375x500", "32x32", "500x333"])
def test_crops_are_distributed_as_the_original(golden, size):
    height, width = map(int, size.split("x"))
    rng = np.random.default_rng(0)
    crops = [
        preprocess.sample_inception_crop(rng, height, width) for _ in range(20_000)
    ]
    found = crop_features(crops, height, width)
    want = crop_features(golden.load("inception_crop_samples.npz")[size], height, width)
    for name in found:
        p_value = stats.ks_2samp(found[name], want[name]).pvalue
        assert p_value > 0.01, f"{name}: p = {p_value}"


def test_area_uniform_crops_would_not_pass(golden):
    """The test above has the power to reject what torchvision and timm do."""
    rng = np.random.default_rng(0)
    want = crop_features(golden.load("inception_crop_samples.npz")["32x32"], 32, 32)
    assert stats.ks_2samp(rng.uniform(0.05, 1, 20_000), want["area"]).pvalue < 1e-6


@pytest.mark.parametrize("shape", [(1, 1), (1, 300), (300, 1), (2, 7)])
def test_crops_stay_inside_tiny_and_narrow_images(shape):
    rng = np.random.default_rng(0)
    for _ in range(200):
        top, left, height, width = preprocess.sample_inception_crop(rng, *shape)
        assert top >= 0
        assert left >= 0
        assert height >= 1
        assert width >= 1
        assert top + height <= shape[0]
        assert left + width <= shape[1]


def test_train_transform_is_a_function_of_image_and_rng():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    transform = preprocess.TrainTransform(crop=24)
    first, again, other = (
        transform(image, np.random.default_rng(s)) for s in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert first.shape == (24, 24, 3)


def test_train_transform_flips_half_the_images():
    image = np.zeros((8, 8, 3), np.uint8)
    image[:, 4:] = 200
    transform = preprocess.TrainTransform(8, area_range=(1, 1), aspect_range=(1, 1))
    rng = np.random.default_rng(0)
    results = [transform(image, rng) for _ in range(400)]
    flipped = sum((result == image[:, ::-1]).all() for result in results)
    kept = sum((result == image).all() for result in results)
    assert flipped + kept == 400
    assert 160 < flipped < 240
    steady = preprocess.TrainTransform(8, (1, 1), (1, 1), flip=False)
    assert all((steady(image, rng) == image).all() for _ in range(20))


def test_float32_transfer_sends_unrounded_values():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    exact = preprocess.TrainTransform(24, transfer="float32")
    rounded = preprocess.TrainTransform(24)
    x, y = (f(image, np.random.default_rng(3)) for f in (exact, rounded))
    assert x.dtype == np.float32
    np.testing.assert_array_equal(y, np.rint(x * 127.5 + 127.5))


def test_randaugment_comes_last_and_sees_whole_levels(monkeypatch):
    seen = []

    def invert(image, rng, layers, magnitude):
        del rng
        seen.append((image.dtype, layers, magnitude))
        return 255 - image

    monkeypatch.setattr(preprocess, "randaugment", invert)
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exact = preprocess.TrainTransform(12, transfer="float32")
    plain = exact(image, np.random.default_rng(1)).astype(np.float64) * 127.5 + 127.5
    changed = preprocess.TrainTransform(12, randaugment=(2, 15.0))(
        image, np.random.default_rng(1)
    )
    np.testing.assert_array_equal(changed, 255 - np.floor(plain + 1e-4))
    assert seen == [(np.uint8, 2, 15.0)]


@pytest.mark.parametrize("transfer", preprocess.TRANSFERS)
def test_permutation_is_the_same_in_training_and_evaluation(transfer):
    image = np.random.default_rng(0).integers(0, 256, (12, 12, 3), np.uint8)
    kwargs = {"crop": 12, "transfer": transfer, "permute": lambda x: x[::-1]}
    train = preprocess.TrainTransform(
        area_range=(1, 1), aspect_range=(1, 1), flip=False, **kwargs
    )
    evaluated = preprocess.EvalTransform(**kwargs)(image)
    np.testing.assert_array_equal(train(image, np.random.default_rng(0)), evaluated)
    plain = preprocess.EvalTransform(12, transfer=transfer)(image)
    np.testing.assert_array_equal(evaluated, plain[::-1])


def resize_small_by_repeating(image, size):
    """Area averages as OpenCV computes them, of the whole image at once."""
    ratio = size / min(image.shape[:2])
    height, width = (round(side * ratio) for side in image.shape[:2])
    factor = max(math.ceil(ratio), 1)
    repeated = image.astype(np.float32).repeat(factor, 0).repeat(factor, 1)
    return np.floor(cv2.resize(repeated, (width, height), interpolation=cv2.INTER_AREA))


@pytest.mark.parametrize(("crop", "size"), [(224, 256), (224, 224), (31, 40), (1, 3)])
def test_enlarging_gives_what_opencv_gives(crop, size):
    rng = np.random.default_rng(0)
    transform = preprocess.EvalTransform(
        crop, "resize_small_then_central_crop", size, transfer="float32"
    )
    shapes = [(1, 1), (1, 9), (20, 2), (size, size), (size - 1, 2 * size)]
    shapes += [tuple(rng.integers(1, size + 20, 2)) for _ in range(40)]
    for i, shape in enumerate(shapes):
        image = rng.integers(0, 256, (*shape, 3), np.uint8)
        if i % 2:  # flat parts show how the sums are rounded
            image = image // 64 * 64
        whole = resize_small_by_repeating(image, size)
        top, left = ((side - crop) // 2 for side in whole.shape[:2])
        want = preprocess.scale(whole[top : top + crop, left : left + crop])
        np.testing.assert_array_equal(transform(image), want, err_msg=str(shape))


PEAK_MEMORY = """
import pathlib
import numpy as np
from mixer_jax.data.interpolate import INTERPOLATIONS
from mixer_jax.data.evaluations import EVALUATIONS
from mixer_jax.data.preprocess import EvalTransform, TrainTransform

def peak_bytes():
    # The resource module would count the memory of the process that started this one.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])

rng = np.random.default_rng(0)
train = TrainTransform(224)
transforms = [
    EvalTransform(224, evaluation, 256, interpolation=interpolation)
    for evaluation in ("resize", "torchvision")
    for interpolation in INTERPOLATIONS
]
transforms += [EvalTransform(224, x, 256) for x in EVALUATIONS]
transforms.append(lambda image: train(image, rng))
for transform in transforms:
    transform(np.zeros((300, 400, 3), np.uint8))
for shape in [(2, 5000), (5000, 2), (1, 40_000), (40_000, 1), (1, 1), (3, 1_000_000)]:
    image = np.full((*shape, 3), 77, np.uint8)
    before = peak_bytes()
    for transform in transforms:
        result = transform(image)
        assert result.shape == (224, 224, 3)
        assert np.abs(result.astype(int) - 77).max() <= 1
    print(peak_bytes() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_for_images_of_extreme_shapes():
    result = subprocess.run(
        [sys.executable, "-c", PEAK_MEMORY], capture_output=True, text=True, check=True
    )
    growths = [int(line) for line in result.stdout.splitlines()]
    assert len(growths) == 6
    assert max(growths) < 60e6


def test_crop_larger_than_the_enlarged_image():
    transform = preprocess.EvalTransform(32, "resize_small_then_central_crop", 20)
    for height in (10, 30):  # enlarged and shrunk
        with pytest.raises(ValueError, match=r"32x32 pixels out of 20x40"):
            transform(np.zeros((height, 2 * height, 3), np.uint8))


def test_a_new_evaluation_needs_no_more_than_its_row(monkeypatch):
    corner = evaluations.Evaluation(
        lambda shape, crop, resize, resample: resample(shape, (0, 0, *crop)),
        "bilinear",
        "cut {crop}, not {resize}",
    )
    monkeypatch.setitem(evaluations.EVALUATIONS, "corner", corner)
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    transform = preprocess.EvalTransform(24, "corner", resize=30)
    np.testing.assert_array_equal(transform(image), image[:24, :24])
    assert transform.steps.startswith("cut 24x24, not 30x30. Resizing equals")


def torchvision_of(image, resize, crop, method):
    """Returns CenterCrop(crop)(Resize(resize, method)(image)) as torchvision does it.

    From torchvision.transforms.functional, for PIL images. If `resize` is no square,
    the first step is timm.data.transforms.ResizeKeepRatio.
    """
    height, width = image.shape[:2]
    if resize[0] == resize[1]:
        short, long = sorted((height, width))
        new_short, new_long = resize[0], int(resize[0] * long / short)
        tall = height >= width
        height, width = (new_long, new_short) if tall else (new_short, new_long)
    else:
        ratio = min(height / resize[0], width / resize[1])
        height, width = round(height / ratio), round(width / ratio)
    resized = np.asarray(Image.fromarray(image).resize((width, height), method))
    top = round((height - crop[0]) / 2.0)
    left = round((width - crop[1]) / 2.0)
    return resized[top : top + crop[0], left : left + crop[1]]


@pytest.mark.parametrize("name", ["pil_bilinear", "pil_bicubic"])
@pytest.mark.parametrize(
    ("crop", "resize"),
    [
        ((32, 32), (36, 36)),
        ((31, 31), (36, 36)),
        ((40, 28), (46, 32)),
        ((8, 9), (9, 9)),
    ],
)
def test_torchvision_and_timm(name, crop, resize):
    method = {"pil_bilinear": Image.BILINEAR, "pil_bicubic": Image.BICUBIC}[name]
    transform = preprocess.EvalTransform(
        crop, "torchvision", resize, "uint8", None, name
    )
    rng = np.random.default_rng(0)
    shapes = [(36, 36), (35, 37), (1, 1), (2, 1800), (1800, 2), (300, 7), resize]
    shapes += [tuple(rng.integers(1, 120, 2)) for _ in range(60)]
    for shape in shapes:
        image = rng.integers(0, 256, (*shape, 3), np.uint8)
        want = torchvision_of(image, resize, crop, method)
        found = transform(image)
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, want, err_msg=str(shape))


@pytest.mark.parametrize(
    ("crop", "resize"),
    [
        ((32, 32), (36, 36)),
        ((32, 32), (33, 33)),
        ((32, 32), (35, 35)),  # 1.5 pixels are left on each side: 2 above
        ((40, 28), (45, 31)),
    ],
)
def test_squash_is_timms(crop, resize):
    """CenterCrop(crop)(Resize(resize)(image)) of torchvision, with two numbers."""
    transform = preprocess.EvalTransform(crop, "squash", resize)
    for shape in [(36, 36), (35, 90), (1, 1), (300, 7), resize]:
        image = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        resized = Image.fromarray(image).resize(resize[::-1], Image.BILINEAR)
        top = round((resize[0] - crop[0]) / 2.0)
        left = round((resize[1] - crop[1]) / 2.0)
        want = np.asarray(resized)[top : top + crop[0], left : left + crop[1]]
        np.testing.assert_array_equal(transform(image), want, err_msg=str(shape))


def test_torchvision_is_bilinear_unless_asked_otherwise():
    bilinear = preprocess.EvalTransform(32, "torchvision", 36)
    assert bilinear.used_interpolation == "pil_bilinear"
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    want = torchvision_of(image, (36, 36), (32, 32), Image.BILINEAR)
    np.testing.assert_array_equal(bilinear(image), want)


@pytest.mark.parametrize("evaluation", evaluations.EVALUATIONS)
@pytest.mark.parametrize("interpolation", [None, *INTERPOLATIONS])
def test_rectangles(evaluation, interpolation):
    """A picture on its side gives the same, on its side."""
    high = preprocess.EvalTransform(
        (24, 16), evaluation, (30, 20), interpolation=interpolation
    )
    wide = preprocess.EvalTransform(
        (16, 24), evaluation, (20, 30), interpolation=interpolation
    )
    for shape in [(60, 40), (61, 80), (9, 50), (24, 16)]:
        image = np.random.default_rng(0).integers(99, 156, (*shape, 3), np.uint8)
        found, turned = high(image), wide(image.swapaxes(0, 1)).swapaxes(0, 1)
        assert found.shape == (24, 16, 3)
        # PIL rounds after each axis.
        np.testing.assert_allclose(found.astype(int), turned.astype(int), atol=2)


def test_central_crops_of_a_rectangle_keep_the_shape_of_the_image():
    """The image just covers `resize`, and the crop is central in it."""
    image = np.zeros((60, 40, 3), np.uint8)
    image[6:54, 4:36] = 255  # the part that is left: 24 x 16 of 30 x 20
    for evaluation in ("resize_small_then_central_crop", "torchvision"):
        transform = preprocess.EvalTransform((24, 16), evaluation, (30, 20))
        found = transform(image)
        assert (found[1:-1, 1:-1] == 255).all()
        wider = np.concatenate(
            [image[:, :20], image[:, 20:21].repeat(9, 1), image[:, 20:]], 1
        )
        assert (transform(wider)[1:-1] == 255).all()


def test_train_transform_of_a_rectangle():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    seen = []
    transform = preprocess.TrainTransform(
        (24, 16), randaugment=(2, 9.0), permute=lambda x: seen.append(x.shape) or x
    )
    for seed in range(20):
        assert transform(image, np.random.default_rng(seed)).shape == (24, 16, 3)
    assert set(seen) == {(24, 16, 3)}


def test_training_interpolates_as_asked():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    whole = {"area_range": (1, 1), "aspect_range": (1.4, 1.4), "flip": False}
    for name in INTERPOLATIONS:
        transform = preprocess.TrainTransform((24, 16), interpolation=name, **whole)
        want = np.rint(resample(image, (24, 16), name))
        found = transform(image, np.random.default_rng(0))
        np.testing.assert_array_equal(found, want, err_msg=name)
    default = preprocess.TrainTransform((24, 16), **whole)
    assert default.interpolation is None
    np.testing.assert_array_equal(
        default(image, np.random.default_rng(0)),
        np.rint(resample(image, (24, 16), "bilinear")),
    )


IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


def test_scale_with_mean_and_standard_deviation():
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3), np.uint8)
    np.testing.assert_array_equal(
        preprocess.scale(images), (images.astype(np.float32) - 127.5) / 127.5
    )
    np.testing.assert_array_equal(
        preprocess.scale(images, (0, 0, 0), (1, 1, 1)), images.astype(np.float32) / 255
    )
    # torchvision's ToTensor and Normalize.
    want = (images / 255 - IMAGENET["mean"]) / IMAGENET["std"]
    found = preprocess.scale(images, **IMAGENET)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, want, atol=1e-6)
    np.testing.assert_array_equal(preprocess.scale(images[0], **IMAGENET), found[0])


def test_one_number_or_three_for_mean_and_standard_deviation():
    transform = preprocess.EvalTransform(8, mean=0, std=[0.25, 0.5, 1])
    assert (transform.mean, transform.std) == ((0.0, 0.0, 0.0), (0.25, 0.5, 1.0))
    assert transform == preprocess.EvalTransform(
        (8, 8), mean=[0, 0, 0], std=(0.25, 0.5, 1)
    )


def test_float32_transfer_applies_mean_and_standard_deviation():
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), np.uint8)
    exact = preprocess.EvalTransform(24, transfer="float32", **IMAGENET)(image)
    want = preprocess.scale(resample(image, (24, 24), "bilinear"), **IMAGENET)
    np.testing.assert_array_equal(exact, want)
    kwargs = {"crop": 24, "transfer": "float32"}
    exact, plain = (
        preprocess.TrainTransform(**kwargs, **more)(image, np.random.default_rng(0))
        for more in (IMAGENET, {})
    )
    want = preprocess.scale(plain * 127.5 + 127.5, **IMAGENET)
    np.testing.assert_allclose(exact, want, atol=1e-5)
