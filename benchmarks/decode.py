"""Times the check for damage against the decoding of image files.

    python benchmarks/decode.py

encodes scikit-learn's two photographs (640 x 427 pixels) and crops of them. For each
kind of file it prints how many microseconds `mixer_jax.data.decode.check_whole` and
OpenCV's decoding take for one image, each the shortest of thirty measurements. Then it
prints how many times as long the evaluation of a JPEG of 4000 x 3000 pixels takes if
the whole image is decoded, as the median of five: for a photograph that is enlarged,
and for one that is repeated, which has as many details as pixels.
"""

import statistics
import time
import timeit
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np
from sklearn.datasets import load_sample_images

from mixer_jax.data.decode import check_whole, decode, open_pixels
from mixer_jax.data.preprocess import EvalTransform


def measure_micros(function: Callable[[], Any]) -> float:
    """Returns the microseconds of a call."""
    return min(timeit.repeat(function, number=5, repeat=30)) / 5 * 1e6


def seconds(transform: EvalTransform, read: Callable[..., Any], data: bytes) -> float:
    """Returns the processor time to decode and transform an image."""
    start = time.process_time()
    transform(read(data))
    return time.process_time() - start


def print_reduced() -> None:
    """Prints what it saves to decode a large photograph at a reduced size."""
    photo = load_sample_images().images[0][..., ::-1]
    for kind, image in (
        ("enlarged", cv2.resize(photo, (4000, 3000), interpolation=cv2.INTER_CUBIC)),
        ("repeated", np.tile(photo, (8, 7, 1))[:3000, :4000]),
    ):
        data = cv2.imencode(".jpg", image)[1].tobytes()
        for evaluation in ("torchvision", "resize_small_then_central_crop"):
            transform = EvalTransform(224, evaluation)
            ratios = [
                seconds(transform, decode, data) / seconds(transform, open_pixels, data)
                for _ in range(5)
            ]
            print(f"{kind}, {evaluation}: {statistics.median(ratios):.1f}")


def main() -> None:
    """Prints a row for each kind of file, and then the ratios."""
    print("file              kilobytes   check us  decode us  share")
    for width, height in ((640, 427), (128, 96)):
        for ending in (".jpg", ".png", ".webp"):
            files = [
                cv2.imencode(ending, photo[:height, :width, ::-1])[1]
                for photo in load_sample_images().images
            ]
            check = decoding = 0.0
            for file in files:
                data = file.tobytes()
                check += measure_micros(lambda data=data: check_whole(data))
                decoding += measure_micros(
                    lambda file=file: cv2.imdecode(file, cv2.IMREAD_COLOR_RGB)
                )
            print(
                f"{width} x {height} {ending:5}".ljust(18)
                + f"{sum(map(len, files)) / len(files) / 1000:9.0f}"
                f"{check / len(files):11.1f}{decoding / len(files):11.0f}"
                f"{check / decoding:7.1%}"
            )
    print_reduced()


if __name__ == "__main__":
    main()
