"""Readers of images, and of tables of them."""

import pathlib
import zlib
from random import Random

import numpy as np
from PIL import Image

from mixer_jax.data.dataset import DatasetError, Example, open_dataset, readable
from mixer_jax.data.decode import ImageError
from mixer_jax.data.fingerprint import fingerprint
from mixer_jax.data.formats import PNG, png_chunks
from mixer_jax.data.preprocess import EvalTransform, TrainTransform
from mixer_jax.data.splits import check_splits

from . import mutations
from .harness import Reader

TRAIN = TrainTransform(8, randaugment=(2, 10))
EVALUATE = EvalTransform(8, "torchvision", 9, interpolation="pil_bicubic")


def write_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """Writes small files of every format, and of many kinds."""
    rng = np.random.default_rng(0)
    rgb = Image.fromarray(rng.integers(0, 255, (9, 14, 3), "uint8"))
    rgba = rgb.copy()
    rgba.putalpha(rgb.convert("L"))
    deep = Image.fromarray(rng.integers(0, 2**16, (9, 14), "uint16"))
    palette = rgb.quantize(9)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = {"save_all": True, "append_images": [palette.rotate(180)]}
    for name, image, options in (
        ("rgb.png", rgb, {"exif": exif}),
        ("rgba.png", rgba, {}),
        ("palette.png", palette, {"transparency": 3}),
        ("grey.png", rgb.convert("L"), {"transparency": 3}),
        ("deep.png", deep, {}),
        ("frames.png", palette, frames),
        ("rgb.jpg", rgb, {"exif": exif}),
        ("progressive.jpg", rgb, {"progressive": True, "subsampling": 0}),
        ("cmyk.jpg", rgb.convert("CMYK"), {}),
        ("rgb.webp", rgb, {"exif": exif}),
        ("rgba.webp", rgba, {}),
        ("lossless.webp", rgba, {"lossless": True}),
        ("frames.webp", rgb, frames),
        ("palette.gif", palette, {"transparency": 3}),
        ("frames.gif", palette, frames),
        ("rgb.bmp", rgb, {}),
        ("palette.bmp", palette, {}),
        ("rgb.tif", rgb, {"tiffinfo": {274: 6}}),
        ("rgba.tif", rgba, {"compression": "tiff_lzw"}),
        ("deep.tif", deep, {"compression": "tiff_adobe_deflate"}),
        ("bits.tif", rgb.convert("1"), {"compression": "group4"}),
        ("jpeg.tif", rgb, {"compression": "jpeg"}),
        ("frames.tif", rgb, frames),
        ("rgb.ppm", rgb, {}),
        ("rgb.jp2", rgb, {}),
    ):
        image.save(folder / name, **options)
    return sorted(folder.iterdir())


def _read_image(path: pathlib.Path) -> None:
    """Does with a file all that a run does."""
    example = Example(path, -1, str(path))
    pixels = example.pixels()
    assert pixels.shape[2:] == (3,)
    assert pixels.dtype == np.uint8
    image = example.open()
    assert EVALUATE(image).shape == (8, 8, 3)
    assert TRAIN(image, np.random.default_rng(0)).shape == (8, 8, 3)


def _mutate_png(rng: Random, data: bytes) -> bytes:
    """Changes a part of a PNG, perhaps uncompressed; the checksums stay right."""
    parts = [(name, data[start:end]) for name, start, end in png_chunks(data)]
    i = rng.randrange(len(parts))
    name, content = parts[i]
    squeezed = name == b"IDAT" and rng.random() < 0.5
    content = zlib.decompress(content) if squeezed else content
    content = mutations.mutate(rng, content, "")
    parts[i] = name, zlib.compress(content) if squeezed else content
    if rng.random() < 0.2:
        rng.shuffle(parts)
    return PNG + b"".join(
        len(x).to_bytes(4, "big") + name + x + zlib.crc32(name + x).to_bytes(4, "big")
        for name, x in parts
    )


mutations.STRUCTURED[".png"] = _mutate_png


def _write_table(folder: pathlib.Path) -> list[pathlib.Path]:
    for i in range(4):
        Image.new("RGB", (3, 2), (60 * i, 0, 0)).save(folder / f"{i}.png")
    lines = ["0.png|ant|train", '1.png|"bee"|Train', "2.png|cat |", "3.png|ant|test"]
    for name, delimiter in ("a.csv", ","), ("a.tsv", "\t"):
        text = "\n".join(["path|label|split", *lines]).replace("|", delimiter)
        (folder / name).write_text(text)
    several = [x.replace('"', "").replace("|", ",", 1) for x in lines]
    text = "\n".join(x.replace("|", "|bee,") for x in several)
    (folder / "b.csv").write_text(f"path,label,split\n{text}\n")
    (folder / "classes.txt").write_text("ant\nbee\ncat\n")
    return [folder / name for name in ("a.csv", "a.tsv", "b.csv", "classes.txt")]


def _read_table(path: pathlib.Path) -> None:
    """Does with a table all that a run does before it starts, and reads its images."""
    table = path if path.suffix != ".txt" else path.with_name("a.csv")
    dataset = open_dataset(str(table))
    check_splits(dataset, "train", dataset.split_names[-1])
    fingerprint(dataset)
    for split in dataset.split_names:
        source = dataset.split(split)
        list(readable(source[i] for i in range(len(source))))


READERS = {
    "images": Reader(write_images, _read_image, (ImageError,), names_file=False),
    "tables": Reader(_write_table, _read_table, (DatasetError,)),
}
