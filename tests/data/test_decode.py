import errno
import functools
import io
import logging
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from mixer_jax.data import decode
from mixer_jax.data.dataset import open_dataset

from ..examples import DAMAGES, ZEROED, encode, photographs, tiff, write_folder


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


def on_white(data: bytes, upright: bool = False) -> np.ndarray:
    """What Pillow makes of a file, on a white background."""
    image = Image.open(io.BytesIO(data))
    image = (ImageOps.exif_transpose(image) if upright else image).convert("RGBA")
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
    **{
        f"{mode} {form}": functools.partial(
            lambda photo, _, mode, form: saved(photo.convert(mode), form),
            mode=mode,
            form=form,
        )
        for form, modes in (("BMP", "RGB L 1"), ("GIF", "L"), ("TIFF", "RGB L 1 CMYK"))
        for mode in modes.split()
    },
    "palette BMP": lambda photo, _: saved(photo.quantize(64), "BMP"),
    "palette GIF": lambda photo, _: saved(photo.quantize(64), "GIF"),
    "palette TIFF": lambda photo, _: saved(photo.quantize(64), "TIFF"),
    "interlaced GIF": lambda photo, _: saved(photo.quantize(9), "GIF", interlace=1),
    "GIF with a transparent colour": lambda photo, _: saved(
        photo.quantize(64), "GIF", transparency=3
    ),
    "RGBA TIFF": lambda _, faded: saved(faded, "TIFF"),
    **{
        f"TIFF compressed with {x}": functools.partial(
            lambda photo, _, x: saved(photo, "TIFF", compression=x), x=x
        )
        for x in ("tiff_lzw", "tiff_adobe_deflate", "packbits")
    },
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


def png(
    depth: int,
    colour: int,
    rows: np.ndarray,
    transparency: bytes = b"",
    bits: bytes = b"",
) -> bytes:
    """A PNG file of [height, bytes] without filters, which Pillow cannot write."""
    height, num_bytes = rows.shape
    samples = {0: 1, 2: 3, 4: 2, 6: 4}[colour]
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
            *([(b"sBIT", bits)] if bits else []),
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
    open_image = decode.open_image

    def fail_and_open(path):
        if len(waits) < failures:
            waits.append(0)
            raise OSError(errno.EIO, "Input/output error")
        return open_image(path)

    monkeypatch.setattr(decode, "open_image", fail_and_open)
    monkeypatch.setattr(decode.time, "sleep", lambda secs: None)
    if failures == 2:
        np.testing.assert_array_equal(example.pixels(), expected)
    else:
        with pytest.raises(decode.ImageError, match="Input/output error"):
            example.pixels()


EXIF_KINDS = {
    "RGBA PNG": lambda photo, faded, **x: saved(faded, "PNG", **x),
    "grey PNG with transparency": lambda photo, faded, **x: saved(
        faded.convert("LA"), "PNG", **x
    ),
    "grey PNG with a transparent level": lambda photo, faded, **x: saved(
        photo.convert("L"), "PNG", transparency=3, **x
    ),
    "RGB PNG with a transparent colour": lambda photo, faded, **x: saved(
        photo, "PNG", transparency=photo.getpixel((0, 0)), **x
    ),
    "palette PNG with a transparent colour": lambda photo, faded, **x: saved(
        photo.quantize(9), "PNG", transparency=3, **x
    ),
    "RGBA WebP": lambda photo, faded, **x: saved(faded, "WEBP", lossless=True, **x),
    "palette PNG": lambda photo, faded, **x: saved(photo.quantize(9), "PNG", **x),
    "grey JPEG": lambda photo, faded, **x: saved(photo.convert("L"), "JPEG", **x),
    "CMYK JPEG": lambda photo, faded, **x: saved(photo.convert("CMYK"), "JPEG", **x),
}


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", EXIF_KINDS)
def test_every_kind_is_turned_upright(photo, faded, kind, turn):
    exif = Image.Exif()
    exif[0x0112] = turn
    data = EXIF_KINDS[kind](photo, faded, exif=exif)
    stored = decode.decode(data)
    assert stored.shape == (96, 144, 3)
    image = decode.decode(data, upright=True)
    want = on_white(data, upright=True)
    np.testing.assert_allclose(image.astype(int), want.astype(int), atol=1)


@pytest.mark.parametrize("turn", [3, 6])
@pytest.mark.parametrize("alpha", [False, True])
def test_tiff_is_turned_upright(photo, faded, turn, alpha):
    data = saved(faded if alpha else photo, "TIFF", tiffinfo={274: turn})
    want = on_white(data)  # Pillow turns it as well
    assert want.shape[:2] == ((144, 96) if turn == 6 else (96, 144))
    image = decode.decode(data, upright=True)
    np.testing.assert_allclose(image.astype(int), want.astype(int), atol=1)


def test_16_bit_png_is_turned_upright():
    levels = np.random.default_rng(0).integers(0, 2**16, (8, 9), np.uint16)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = saved(Image.fromarray(levels), "PNG", exif=exif)
    upright = decode.decode(data, upright=True)
    np.testing.assert_array_equal(upright[..., 0], np.rot90(levels >> 8, -1))


@pytest.fixture
def said(monkeypatch, caplog):
    """What is said once in a process, anew in each test."""
    monkeypatch.setattr(decode, "_said", set())
    caplog.set_level(logging.WARNING)
    return caplog


def levels_of(bits: int) -> np.ndarray:
    """uint16 [16, 16] from 0 to 2**bits - 1, in no order."""
    levels = np.linspace(0, 2**bits - 1, 256).astype(">u2")
    return np.random.default_rng(bits).permutation(levels).reshape(16, 16)


def as_rows(levels: np.ndarray) -> np.ndarray:
    return levels.astype(">u2").view(np.uint8).reshape(len(levels), -1)


@pytest.mark.parametrize("bits", [8, 9, 10, 12, 14])
@pytest.mark.parametrize("colour", [0, 2, 4, 6])
def test_low_bits_of_a_16_bit_png_count_if_it_states_them(bits, colour, said):
    grey = levels_of(bits)
    samples = {0: [grey], 2: [grey] * 3, 4: [grey] * 2, 6: [grey] * 4}[colour]
    if colour & 4:
        samples[-1] = np.full_like(grey, 2**16 - 1)  # opaque
    rows = as_rows(np.stack(samples, -1).reshape(16, -1))
    image = decode.decode(png(16, colour, rows, bits=bytes([bits] * len(samples))))
    want = grey >> (bits - 8)
    np.testing.assert_array_equal(image, np.stack([want] * 3, -1))
    assert not said.text


@pytest.mark.parametrize("bits", [8, 10, 12])
@pytest.mark.parametrize("dark", [False, True])
def test_bits_that_are_spread_over_16_are_taken_as_they_are(bits, dark, said):
    """As the specification of PNG wants it; three ways to do so are in use."""
    low = levels_of(bits).astype(int) // (2**5 if dark else 1)
    for spread in (
        low << (16 - bits),
        low << (16 - bits) | low >> (2 * bits - 16),
        np.rint(low * (65535 / (2**bits - 1))).astype(int),
    ):
        data = png(16, 0, as_rows(spread.astype(">u2")), bits=bytes([bits]))
        np.testing.assert_array_equal(decode.decode(data)[..., 0], spread >> 8)


def test_transparent_level_of_a_png_with_12_bits():
    grey = levels_of(12)
    grey[0] = 77
    data = png(16, 0, as_rows(grey), (77).to_bytes(2, "big"), bits=b"\x0c")
    want = np.where(grey == 77, 255, grey >> 4)
    np.testing.assert_array_equal(decode.decode(data)[..., 0], want)


@pytest.mark.parametrize("tag", [281, 341])
@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("highest", [4095, 3900, 1023])
def test_low_bits_of_a_16_bit_tiff_count_if_it_states_them(tag, order, highest, said):
    bits = highest.bit_length()
    grey = np.minimum(levels_of(bits), highest)
    pixels = grey.astype(f"{order}u2").tobytes()
    data = tiff(pixels, 16, 16, {258: (16,), tag: (highest,)}, order)
    np.testing.assert_array_equal(decode.decode(data)[..., 0], grey >> (bits - 8))
    inverted = tiff(pixels, 16, 16, {258: (16,), tag: (highest,), 262: (0,)}, order)
    image = decode.decode(inverted)[..., 0]
    np.testing.assert_array_equal(image, 255 - (grey >> (bits - 8)))
    assert not said.text


@pytest.mark.parametrize("bits", [10, 12, 14])
def test_packed_bits_of_a_tiff(bits, said):
    grey = levels_of(bits)
    text = "".join(f"{x:0{bits}b}" for x in grey.ravel())
    pixels = bytes(int(text[i : i + 8], 2) for i in range(0, len(text), 8))
    data = tiff(pixels, 16, 16, {258: (bits,), 281: (2**bits - 1,)})
    np.testing.assert_array_equal(decode.decode(data)[..., 0], grey >> (bits - 8))


def test_low_bits_that_are_not_stated_are_told_once(said):
    dark = [png(16, 0, as_rows(levels_of(12))) for _ in range(2)]
    dark.append(tiff(levels_of(10).astype("<u2").tobytes(), 16, 16, {258: (16,)}))
    for i, data in enumerate(dark):
        image = decode.decode(data, name=f"photo {i}")
        assert image.max() < 16  # as it stands in the file
    (message,) = [record.getMessage() for record in said.records]
    assert "photo 0 has 16 bits a channel and values up to 4095 of 65535" in message
    assert "sBIT" in message


def test_bright_and_black_16_bit_images_are_not_told(said):
    for levels in (levels_of(16), levels_of(13), np.zeros((16, 16))):
        data = png(16, 0, as_rows(levels))
        np.testing.assert_array_equal(
            decode.decode(data)[..., 0], levels.astype(int) >> 8
        )
    assert not said.text


@pytest.mark.parametrize(
    ("tags", "pixels", "message"),
    [
        ({258: (32,), 339: (3,)}, bytes(1024), "32 bits a sample with a fraction"),
        ({258: (16,), 339: (2,)}, bytes(512), "16 bits a sample with a sign"),
        ({258: (32,)}, bytes(1024), "TIFF of 32 bits a sample; expected at most 16"),
        ({258: (4,)}, bytes(128), "a TIFF that is cut off, damaged or of a kind"),
        ({258: (8, 8), 277: (2,), 338: (2,)}, bytes(512), "a grey TIFF with transp"),
    ],
)
def test_tiffs_that_have_no_known_range_are_refused(tags, pixels, message):
    with pytest.raises(decode.ImageError, match=message):
        decode.decode(tiff(pixels, 16, 16, tags))


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_alpha_of_a_tiff(bits, extra):
    """0 says nothing of the channel, 1 and 2 that it is alpha; 1: already applied."""
    rng = np.random.default_rng(0)
    rgba = rng.integers(0, 256, (5, 6, 4))
    alpha = rgba[..., 3:]
    if extra == 1:
        rgba[..., :3] = rgba[..., :3] * alpha // 255
    stored = (rgba * 257).astype("<u2") if bits == 16 else rgba.astype(np.uint8)
    tags = {258: (bits,) * 4, 262: (2,), 277: (4,), 338: (extra,)}
    image = decode.decode(tiff(stored.tobytes(), 6, 5, tags)).astype(int)
    rgb = rgba[..., :3]
    want = {
        0: rgb,
        1: rgb + 255 - alpha,
        2: (rgb * alpha + 255 * (255 - alpha)) / 255,
    }[extra]
    np.testing.assert_allclose(image, want, atol=1)


@pytest.mark.parametrize("form", ["GIF", "TIFF", "WEBP", "PNG"])
def test_first_frame_is_taken_and_the_others_are_told_once(photo, form, said):
    other = ImageOps.mirror(photo)
    first = photo.quantize(200) if form == "GIF" else photo
    options = {"lossless": True} if form == "WEBP" else {}
    data = saved(first, form, save_all=True, append_images=[other, photo], **options)
    image = decode.decode(data, name="many.gif")
    decode.decode(data, name="others.gif")
    np.testing.assert_array_equal(image, np.asarray(first.convert("RGB")))
    (message,) = [record.getMessage() for record in said.records]
    assert message.startswith("many.gif has 3 frames; the first is taken")
    decode.decode(saved(first, form))
    assert len(said.records) == 1


@pytest.mark.parametrize("form", ["BMP", "GIF", "TIFF"])
def test_other_files_that_are_cut_off_are_refused(photo, form, capfd):
    data = saved(photo.quantize(64) if form == "GIF" else photo, form)
    decode.decode(data)
    for length in (0, 1, 7, 20, len(data) // 2, len(data) - 9):
        with pytest.raises(decode.ImageError):
            decode.decode(data[:length])
    assert not capfd.readouterr().err


def test_gifs_of_any_bytes_end_in_an_image_error():
    for seed in range(50):
        rng = np.random.default_rng(seed)
        for start in (b"GIF89a", b"II*\0", b"MM\0*", b"BM", b"RIFF\0\0\0\0WEBP"):
            with pytest.raises(decode.ImageError):
                decode.decode(start + rng.bytes(rng.integers(0, 99)))
