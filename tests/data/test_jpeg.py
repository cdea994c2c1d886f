"""JPEG files of which no more is decoded than is needed."""

import contextlib
import io
import itertools

import cv2
import numpy as np
import pytest
from PIL import Image

from mixer_jax.data import pipeline
from mixer_jax.data.dataset import Example
from mixer_jax.data.decode import ImageError, decode, open_pixels
from mixer_jax.data.evaluations import EVALUATIONS
from mixer_jax.data.jpeg import Jpeg, reduction
from mixer_jax.data.preprocess import (
    EvalTransform,
    TrainTransform,
)

from ..examples import photographs


def saved(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def turned(turn: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = turn
    return exif


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(photographs()[0][100:275, 60:271])


# Those that are decoded from the top as far as needed, and those that are not.
PLAIN = {
    "4:2:0": lambda photo: saved(photo),
    "4:2:2": lambda photo: saved(photo, subsampling=1),
    "4:4:4": lambda photo: saved(photo, subsampling=0, optimize=True),
    "4:4:0": lambda photo: cv2.imencode(
        ".jpg", np.asarray(photo), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x121111]
    )[1].tobytes(),
    "4:1:1": lambda photo: cv2.imencode(
        ".jpg", np.asarray(photo), [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, 0x411111]
    )[1].tobytes(),
    "grey": lambda photo: saved(photo.convert("L")),
    "CMYK": lambda photo: saved(photo.convert("CMYK")),
    "narrow": lambda photo: saved(photo.resize((3, 211))),
    **{f"turn {i}": lambda photo, i=i: saved(photo, exif=turned(i)) for i in (0, 1, 9)},
    "followed": lambda photo: saved(photo) + saved(photo.rotate(180)),
}
WHOLE = {
    "progressive": lambda photo: saved(photo, progressive=True),
    "restarts": lambda photo: saved(photo, restart_marker_blocks=5),
    **{f"turn {i}": lambda photo, i=i: saved(photo, exif=turned(i)) for i in (2, 3, 6)},
}


@pytest.mark.parametrize("kind", [*PLAIN, *WHOLE])
def test_a_window_is_part_of_the_whole_image(photo, kind, capfd):
    data = (PLAIN | WHOLE)[kind](photo)
    image, opened = decode(data, upright=True), open_pixels(data, upright=True)
    assert isinstance(opened, Jpeg)
    assert opened.shape == image.shape
    rng = np.random.default_rng(0)
    height, width = image.shape[:2]
    for bottom in (1, 2, *rng.integers(3, height, 40), height - 1, height):
        top, left = rng.integers(bottom), rng.integers(width)
        window = int(top), int(left), int(bottom - top), int(width - left)
        want = image[top:bottom, left:]
        np.testing.assert_array_equal(opened.window(*window), want)
    assert "JPEG" not in capfd.readouterr().err  # libjpeg writes its warnings there
    # Is it true that rows are left out?
    rows = opened._rows(40)
    assert rows is None if kind in WHOLE else len(rows) < 60


def test_a_window_above_damage_and_below_it(photo):
    """Pixels that end too early, with a mark of the end, are decoded as before."""
    data = saved(photo)
    data = data[: len(data) * 2 // 3] + b"\xff\xd9"
    image, opened = decode(data), open_pixels(data)
    for bottom in range(1, len(image) + 1, 6):
        np.testing.assert_array_equal(opened.window(0, 0, bottom, 211), image[:bottom])


@pytest.mark.parametrize("turn", [1, 4, 5, 8])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_shrunk_image_is_made_of_means(photo, turn, factor):
    photo = photo.crop((0, 0, 208, 168))
    data = saved(photo, quality=98, subsampling=0, exif=turned(turn))
    image = open_pixels(data, upright=True).shrunk(factor)
    whole = decode(data, upright=True)
    size = [side // factor for side in whole.shape[:2]]
    assert image.shape == (*size, 3)
    means = cv2.resize(whole, size[::-1], interpolation=cv2.INTER_AREA)
    assert np.abs(image - means.astype(float)).mean() < 1


TRAIN = {
    "float32": {"transfer": "float32"},
    "cubic": {"interpolation": "bicubic"},
    "RandAugment": {"randaugment": (2, 10.0)},
    "permuted": {"transfer": "float32", "permute": lambda image: image[::-1]},
}


@pytest.mark.parametrize("options", [*TRAIN, "default"])
def test_training_crops_of_a_file_are_those_of_its_pixels(photo, options):
    transform = TrainTransform((40, 32), **TRAIN.get(options, {}))
    data = saved(photo)
    tolerance = 1 if options == "default" else 0  # levels, as docs/data.md says
    for seed in range(30):
        rng, again = np.random.default_rng(seed), np.random.default_rng(seed)
        found = transform(open_pixels(data), rng)
        want = transform(decode(data), again)
        assert found.dtype == want.dtype
        np.testing.assert_allclose(
            found.astype(float), want.astype(float), atol=tolerance, rtol=0
        )
        assert rng.random() == again.random()  # nothing else was drawn


@pytest.fixture(scope="module")
def large() -> bytes:
    """A photograph of a camera, which has more pixels than details."""
    photo = Image.fromarray(photographs()[1])
    return saved(photo.resize((2568, 1712), Image.Resampling.BICUBIC), quality=90)


EXACT = [
    ("resize", {}),
    ("resize_then_central_crop", {}),
    ("torchvision", {"transfer": "float32"}),
    ("resize_small_then_central_crop", {"transfer": "float32"}),
    ("squash", {"interpolation": "bicubic"}),
    ("torchvision", {"resize": 900}),  # less than twice as many pixels
]


@pytest.mark.parametrize(("evaluation", "options"), EXACT)
def test_evaluation_of_a_file_is_that_of_its_pixels(large, evaluation, options):
    transform = EvalTransform(**{"crop": 224, "evaluation": evaluation} | options)
    np.testing.assert_array_equal(
        transform(open_pixels(large)), transform(decode(large))
    )


REDUCED = [(name, x) for name in EVALUATIONS for x in ("area", "pil_bilinear")]


@pytest.mark.parametrize("crop", [64, 224])  # reduced to 1/8 and 1/2
@pytest.mark.parametrize(("evaluation", "interpolation"), REDUCED)
def test_evaluation_of_a_large_file(
    large, monkeypatch, evaluation, interpolation, crop
):
    """The tolerance is that of docs/data.md."""
    factors, shrunk = [], Jpeg.shrunk
    monkeypatch.setattr(
        Jpeg, "shrunk", lambda self, x=1: factors.append(x) or shrunk(self, x)
    )
    transform = EvalTransform(
        crop, evaluation, resize=crop * 8 // 7, interpolation=interpolation
    )
    found = transform(open_pixels(large)).astype(float)
    assert factors == [8 if crop == 64 else 2]
    difference = np.abs(found - transform(decode(large)))
    assert difference.mean() < 0.7
    assert difference.max() <= 13


def test_sizes_that_are_reduced():
    assert reduction((1712, 2568, 3), (100, 150)) == 8
    assert reduction((1712, 2568, 3), (108, 150)) == 4  # the rest would be 214 high
    assert reduction((1708, 2568, 3), (100, 150)) == 4  # not divisible by 8
    assert reduction((1709, 2568, 3), (100, 150)) == 1
    assert reduction((375, 500, 3), (224, 224)) == 1


def test_a_file_that_proves_damaged_when_it_is_decoded(photo):
    """Is replaced by the same image as one that is seen to be damaged at once."""
    data = saved(photo)
    tables = data.index(b"\xff\xc4")
    late = data[: tables + 5] + b"\xff" * 8 + data[tables + 13 :]
    with pytest.raises(ImageError):
        decode(late)
    assert isinstance(open_pixels(late), Jpeg)

    def batches(damaged: bytes) -> list[dict[str, np.ndarray]]:
        source = [
            Example(damaged if i % 2 else saved(photo.rotate(i)), i, str(i))
            for i in range(12)
        ]
        iterator = pipeline.train_batches(
            source, TrainTransform(16), batch_size=12, seed=0
        )
        with contextlib.closing(iterator):
            return list(itertools.islice(iterator, 3))

    for found, want in zip(batches(late), batches(b""), strict=True):
        for key in want:
            np.testing.assert_array_equal(found[key], want[key])
