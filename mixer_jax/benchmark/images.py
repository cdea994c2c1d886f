"""Made-up photographs, for who has no dataset at hand."""

import pathlib

import cv2
import numpy as np
from sklearn.datasets import load_sample_images

WIDTH, HEIGHT = 500, 375  # pixels; usual for ImageNet
QUALITY = 96  # of the JPEGs, for about 100 kB each, as in ImageNet


def write_images(folder: pathlib.Path, count: int) -> list[pathlib.Path]:
    """Writes a dataset of JPEG files: <folder>/{train,test}/{a,b}/<i>.jpg.

    Each is a part of one of scikit-learn's photographs, lit by a smooth random field.
    So they take as long to decode as photographs do, and no two are equal.

    Args:
      folder: where to.
      count: of images in each split.

    Returns:
      the paths of the test images.
    """
    rng = np.random.default_rng(0)
    photos = load_sample_images().images
    paths = []
    for split in ("train", "test"):
        for i in range(count):
            path = folder / split / "ab"[i % 2] / f"{i:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            photo = photos[i % len(photos)]
            top, left = (
                rng.integers(a - b + 1)
                for a, b in zip(photo.shape, (HEIGHT, WIDTH), strict=False)
            )
            part = photo[top : top + HEIGHT, left : left + WIDTH].astype(np.float32)
            field = rng.normal(1.0, 0.2, (6, 8, 3)).astype(np.float32)
            light = cv2.resize(field, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
            pixels = np.clip(part * light, 0, 255).astype(np.uint8)
            options = [cv2.IMWRITE_JPEG_QUALITY, QUALITY]
            encoded = cv2.imencode(".jpg", pixels[..., ::-1], options)[1]
            path.write_bytes(encoded.tobytes())
            paths.append(path)
    return paths[count:]
