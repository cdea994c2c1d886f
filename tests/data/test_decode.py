import errno
import io
import pathlib
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from mixer_jax.data import decode
from mixer_jax.data.dataset import open_dataset

from ..examples import DAMAGES, ZEROED, encode, photographs, write_folder


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
    "grey PNG with a transparent level": lambda photo, _: saved(
        photo.convert("L"), "PNG", transparency=photo.convert("L").getpixel((0, 0))
    ),
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


def png(depth: int, colour: int, rows: np.ndarray, transparency: bytes) -> bytes:
    """A PNG file of [height, bytes] without filters, which Pillow cannot write."""
    height, num_bytes = rows.shape
    samples = {0: 1, 2: 3}[colour]
    size = [num_bytes * 8 // (depth * samples), height]
    header = b"".join(x.to_bytes(4, "big") for x in size)
    pixels = np.pad(rows, ((0, 0), (1, 0))).astype(np.uint8).tobytes()
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        len(content).to_bytes(4, "big")
        + name
        + content
        + zlib.crc32(name + content).to_bytes(4, "big")
        for name, content in [
            (b"IHDR", header + bytes([depth, colour, 0, 0, 0])),
            (b"tEXt", b"Comment\0tRNS"),  # which is no tRNS chunk
            *([(b"tRNS", transparency)] if transparency else []),
            (b"IDAT", zlib.compress(pixels)),
            (b"IEND", b""),
        ]
    )


@pytest.mark.parametrize("mode", ["L", "I;16", "1"])
def test_transparent_level_of_a_grey_png_is_white(mode):
    """Such files hold drawings on a background that is not meant to be seen."""
    levels = {
        "L": np.array([[0, 100, 200], [0, 99, 101]], np.uint8),
        # 0x0001 has the upper bits of the transparent level, but is opaque.
        "I;16": np.array([[0, 0x0001, 0x8001], [0x7FFF, 0, 0xFF00]], np.uint16),
        "1": np.array([[0, 255, 0], [255, 0, 255]], np.uint8),
    }[mode]
    image = Image.fromarray(levels)
    data = saved(image.convert("1") if mode == "1" else image, "PNG", transparency=0)
    assert b"tRNS" in data
    upper = levels >> 8 if mode == "I;16" else levels
    want = np.where(levels == 0, 255, upper)
    np.testing.assert_array_equal(decode.decode(data), np.stack([want] * 3, -1))
    np.testing.assert_array_equal(
        decode.decode(data, upright=True), np.stack([want] * 3, -1)
    )


@pytest.mark.parametrize("depth", [1, 2, 4, 8])
def test_transparent_level_of_every_depth(depth):
    rows = np.arange(256).reshape(16, 16)
    highest = 2**depth - 1
    shifts = np.arange(8 - depth, -1, -depth)
    levels = (rows[..., None] >> shifts & highest).reshape(16, -1) * (255 // highest)
    for level in range(0, highest + 1, max(highest // 5, 1)):
        # Only the lower bits of the two bytes count.
        data = png(depth, 0, rows, (level | 0x4200).to_bytes(2, "big"))
        want = np.where(levels == level * (255 // highest), 255, levels)
        image = decode.decode(data)
        np.testing.assert_array_equal(image, np.stack([want] * 3, -1))
    opaque = decode.decode(png(depth, 0, rows, b""))
    np.testing.assert_array_equal(opaque, np.stack([levels] * 3, -1))


def test_transparent_colour_of_a_16_bit_png_is_white():
    levels = np.array([[[1, 2, 3], [1, 2, 4], [0xABCD, 0x1234, 0xFFFF]]], ">u2")
    data = png(16, 2, levels.view(np.uint8).reshape(1, -1), levels[0, 0].tobytes())
    image = decode.decode(data)
    np.testing.assert_array_equal(image, [[[255] * 3, [0] * 3, [0xAB, 0x12, 0xFF]]])


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
    data = bytearray(png(8, 2, np.zeros((1, 3)), b""))
    data[16:24] = (2**31 - 1).to_bytes(4, "big") * 2
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    with pytest.raises(decode.ImageError):
        decode.decode(bytes(data))


def test_encode_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    np.testing.assert_array_equal(decode.decode(encode(image)), image)


@pytest.mark.parametrize("failures", [2, 3])
def test_what_a_network_disk_fails_to_read_is_read_again(
    tmp_path, monkeypatch, failures
):
    root = write_folder(tmp_path, {"train/a": 1})
    example = open_dataset(str(root)).split("train")[0]
    expected, waits = example.pixels(), []
    read = pathlib.Path.read_bytes

    def read_bytes(path):
        if len(waits) < failures:
            waits.append(0)
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    monkeypatch.setattr(decode.time, "sleep", lambda secs: None)
    if failures == 2:
        np.testing.assert_array_equal(example.pixels(), expected)
    else:
        with pytest.raises(decode.ImageError, match="Input/output error"):
            example.pixels()
