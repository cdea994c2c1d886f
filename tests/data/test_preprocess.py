import io
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps
from scipy import stats

from mixer_jax.data import decode, preprocess

from ..examples import DAMAGES, ZEROED, photographs

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


@pytest.mark.parametrize("ending", [".jpg", ".png", ".webp"])
def test_decode_gives_rgb(ending):
    image = np.zeros((16, 16, 3), np.uint8)
    image[..., 0] = 250  # red
    data = cv2.imencode(ending, image[..., ::-1])[1].tobytes()
    np.testing.assert_allclose(decode.decode(data), image, atol=6)


def saved(image: Image.Image, form: str, **options) -> bytes:
    """A file's contents as Pillow writes them."""
    file = io.BytesIO()
    image.save(file, form, **options)
    return file.getvalue()


def on_white(data: bytes) -> np.ndarray:
    """What Pillow makes of a file, on a white background."""
    image = Image.open(io.BytesIO(data)).convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return np.asarray(Image.alpha_composite(white, image).convert("RGB"))


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(photographs()[0][:96, :144])


@pytest.fixture(scope="module")
def faded(photo) -> Image.Image:
    """The photograph, opaque at the right and transparent at the left."""
    alpha = np.linspace(0, 255, photo.width).astype(np.uint8)
    faded = photo.copy()
    faded.putalpha(Image.fromarray(np.tile(alpha, (photo.height, 1))))
    return faded


KINDS = {
    "grey JPEG": lambda photo, _: saved(photo.convert("L"), "JPEG"),
    "grey PNG": lambda photo, _: saved(photo.convert("L"), "PNG"),
    "black and white PNG": lambda photo, _: saved(photo.convert("1"), "PNG"),
    "progressive JPEG": lambda photo, _: saved(photo, "JPEG", progressive=True),
    "CMYK JPEG, Adobe's": lambda photo, _: saved(photo.convert("CMYK"), "JPEG"),
    "YCCK JPEG": lambda photo, _: ycck(photo),
    "palette PNG": lambda photo, _: saved(photo.quantize(64), "PNG"),
    "palette PNG with one transparent colour": lambda photo, _: saved(
        photo.quantize(64), "PNG", transparency=3
    ),
    "palette PNG with transparency": lambda photo, _: saved(
        photo.quantize(64), "PNG", transparency=bytes(range(0, 256, 4))
    ),
    "RGB PNG with a transparent colour": lambda photo, _: saved(
        photo, "PNG", transparency=photo.getpixel((0, 0))
    ),
    "RGBA PNG": lambda _, faded: saved(faded, "PNG"),
    "grey PNG with transparency": lambda _, faded: saved(faded.convert("LA"), "PNG"),
    "lossless WebP": lambda photo, _: saved(photo, "WEBP", lossless=True),
    "lossless RGBA WebP": lambda _, faded: saved(faded, "WEBP", lossless=True),
    "RGBA WebP": lambda _, faded: saved(faded, "WEBP"),
}


def ycck(photo: Image.Image) -> bytes:
    """An Adobe JPEG that says of its first three channels that they are YCC."""
    data = bytearray(saved(photo.convert("CMYK"), "JPEG"))
    data[data.index(b"Adobe") + 11] = 2
    return bytes(data)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_file_is_read_as_pillow_reads_it(photo, faded, kind):
    data = KINDS[kind](photo, faded)
    image = decode.decode(data)
    assert image.dtype == np.uint8
    # Pillow and OpenCV round alpha and the products of CMYK in their own ways.
    np.testing.assert_allclose(image.astype(int), on_white(data), atol=1)


def test_transparent_pixels_are_white_whatever_their_colour():
    hidden = np.full((8, 8, 4), (200, 0, 100, 0), np.uint8)
    hidden[4:] = (10, 20, 30, 255)
    for form in ("PNG", "WEBP"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        image = decode.decode(saved(Image.fromarray(hidden), form, **options))
        assert (image[:4] == 255).all()
        assert (image[4:] == (10, 20, 30)).all()


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_16_bit_png_keeps_the_upper_8_bits(channels):
    levels = np.random.default_rng(0).integers(0, 2**16, (8, 9, channels), np.uint16)
    if channels == 4:
        levels[..., 3] = 2**16 - 1
    data = cv2.imencode(".png", levels)[1].tobytes()
    colours = levels[..., 2::-1] if channels > 1 else levels.repeat(3, -1)
    np.testing.assert_array_equal(decode.decode(data), colours >> 8)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_counts_if_asked_for(photo, form):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    data = saved(photo, form, exif=exif)
    assert decode.decode(data).shape == (96, 144, 3)
    upright = decode.decode(data, upright=True)
    want = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
    np.testing.assert_allclose(upright.astype(int), np.asarray(want), atol=1)


@pytest.mark.parametrize("data", [b"\xff\xd8\xff not a JPEG", b"GIF8 or so", b"x"])
def test_decode_of_what_is_no_image(data):
    with pytest.raises(decode.ImageError):
        decode.decode(data)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("form", ["JPEG", "progressive JPEG", "PNG", "WEBP"])
def test_damaged_files_are_found_without_noise(photo, form, damage, capfd):
    options = {"progressive": True} if form.startswith("prog") else {}
    data = DAMAGES[damage](saved(photo, form.split()[-1], **options))
    if (form, damage) == ("WEBP", ZEROED):
        return  # WebP has no checksums
    with pytest.raises(decode.ImageError):
        decode.decode(data)
    assert "libpng" not in capfd.readouterr().err


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_files_cut_off_anywhere_are_refused(photo, form):
    # JPEGs of cameras hold a thumbnail, with an end-of-image marker of its own.
    data = saved(photo, form, comment=b"a thumbnail \xff\xd9")
    decode.decode(data)
    for length in range(0, len(data) - 1, 97):
        with pytest.raises(decode.ImageError):
            decode.decode(data[:length])


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_what_follows_the_image_is_no_damage(photo, form):
    data = saved(photo, form)
    followed = decode.decode(data + b"\xff\xd8 a phone's second image")
    np.testing.assert_array_equal(followed, decode.decode(data))


def test_image_of_absurd_size_is_an_image_error():
    header = b"IHDR" + (2**31 - 1).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    chunks = [header, b"IDAT" + zlib.compress(bytes(9)), b"IEND"]
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        (len(chunk) - 4).to_bytes(4, "big")
        + chunk
        + zlib.crc32(chunk).to_bytes(4, "big")
        for chunk in chunks
    )
    with pytest.raises(decode.ImageError):
        decode.decode(data)


def test_central_crop_larger_than_the_image():
    with pytest.raises(ValueError, match=r"32x32 pixels out of 20x40"):
        preprocess.central_crop(np.zeros((20, 40, 3)), 32)
