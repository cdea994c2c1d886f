"""Times the check for damage against the decoding of image files.

    python benchmarks/decode.py

encodes scikit-learn's two photographs (640 x 427 pixels) and crops of them. For each
kind of file it prints how many microseconds `mixer_jax.data.decode.check_whole` and
OpenCV's decoding take for one image, each the shortest of thirty measurements.
"""

import timeit
from collections.abc import Callable
from typing import Any

import cv2
from sklearn.datasets import load_sample_images

from mixer_jax.data.decode import check_whole


def measure_micros(function: Callable[[], Any]) -> float:
    """Returns the microseconds of a call."""
    return min(timeit.repeat(function, number=5, repeat=30)) / 5 * 1e6


def main() -> None:
    """Prints a row for each kind of file."""
    print("file              kilobytes   check us  decode us  share")
    for width, height in ((640, 427), (128, 96)):
        for ending in (".jpg", ".png", ".webp"):
            files = [
                cv2.imencode(ending, photo[:height, :width, ::-1])[1]
                for photo in load_sample_images().images
            ]
            check = decode = 0.0
            for file in files:
                data = file.tobytes()
                check += measure_micros(lambda data=data: check_whole(data))
                decode += measure_micros(
                    lambda file=file: cv2.imdecode(file, cv2.IMREAD_COLOR_RGB)
                )
            print(
                f"{width} x {height} {ending:5}".ljust(18)
                + f"{sum(map(len, files)) / len(files) / 1000:9.0f}"
                f"{check / len(files):11.1f}{decode / len(files):11.0f}"
                f"{check / decode:7.1%}"
            )


if __name__ == "__main__":
    main()
