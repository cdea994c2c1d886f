"""Readers of images and tables."""

import pathlib

import cv2
import numpy as np

from mixer_jax.data.decode import ImageError, decode

from .harness import Reader


def _write_images(folder: pathlib.Path) -> list[pathlib.Path]:
    image = np.random.default_rng(0).integers(0, 255, (9, 7, 3), "uint8")
    paths = [folder / f"a{ending}" for ending in (".png", ".jpg", ".webp", ".bmp")]
    for path in paths:
        assert cv2.imwrite(str(path), image)
    return paths


READERS = {
    "images": Reader(
        _write_images,
        lambda path: decode(path.read_bytes()),
        (ImageError,),
        names_file=False,
    ),
}
