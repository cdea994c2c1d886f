"""Compares the training input with tf.data: from a folder of JPEG files to crops.

    python benchmarks/tfdata.py --tf_python=/path/to/another/bin/python

Both read 4,096 files of 500 x 375 pixels, 256 different crops of scikit-learn's two
photographs, and make of them batches of 224 x 224 crops, uint8: a random window,
resized, mirrored half of the time. tf.data runs in a process of its own with another
Python, that of an environment with tensorflow-cpu; the two take turns. For each, the
median of the rounds is printed: images a second, and images a second of processor time,
which other programs on the machine disturb less; then the medians of the ratios of one
round. --image_size and --crop choose other sizes.
"""

import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

BATCH = 64
AREA_RANGE, ASPECT_RANGE = (0.05, 1.0), (0.75, 1.33)  # those of TrainTransform


def rates(batches: Iterator[Any], count: int) -> tuple[float, float]:
    """Returns images a second, and images a second of this process's processor time."""
    for _ in range(4):
        next(batches)
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(count):
        next(batches)
    images = BATCH * count
    return images / (time.perf_counter() - wall), images / (time.process_time() - cpu)


def tf_batches(folder: pathlib.Path, crop: int) -> Iterator[Any]:
    """Gives uint8 [BATCH, crop, crop, 3] of tf.data."""
    import tensorflow as tf

    def prepare(path: Any) -> Any:
        data = tf.io.read_file(path)
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.io.extract_jpeg_shape(data),
            tf.zeros([0, 0, 4], tf.float32),
            area_range=AREA_RANGE,
            aspect_ratio_range=ASPECT_RANGE,
            min_object_covered=0,
            use_image_if_no_bounding_boxes=True,
        )
        window = tf.concat([begin[:2], size[:2]], 0)
        image = tf.image.decode_and_crop_jpeg(data, window, channels=3)
        image = tf.image.resize(image, (crop, crop))
        image = tf.image.random_flip_left_right(image)
        return tf.cast(tf.round(image), tf.uint8)

    files = sorted(map(str, folder.rglob("*.jpg")))
    dataset = tf.data.Dataset.from_tensor_slices(files).repeat().shuffle(len(files))
    dataset = dataset.map(prepare, tf.data.AUTOTUNE).batch(BATCH, drop_remainder=True)
    return dataset.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()


def serve_tf(folder: pathlib.Path, crop: int, count: int) -> None:
    """Measures once for each line that it reads."""
    for _ in sys.stdin:
        print(*rates(tf_batches(folder, crop), count), flush=True)


def our_rates(folder: pathlib.Path, crop: int, count: int) -> tuple[float, float]:
    """Returns what `rates` does of our pipeline."""
    from mixer_jax.data.dataset import open_dataset
    from mixer_jax.data.pipeline import train_batches
    from mixer_jax.data.preprocess import TrainTransform

    source = open_dataset(str(folder)).split("train")
    transform = TrainTransform(crop, AREA_RANGE, ASPECT_RANGE)
    batches = train_batches(source, transform, batch_size=BATCH, seed=0)
    with contextlib.closing(batches):
        return rates(batches, count)


def write_photographs(folder: pathlib.Path, width: int, height: int) -> None:
    """Writes 256 JPEG files of quality 90, in four classes, each with 16 names."""
    import cv2
    import numpy as np
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    rng = np.random.default_rng(0)
    for i in range(256):
        photo = photos[i % 2][:, :: rng.choice((-1, 1)), ::-1]
        share = rng.uniform(0.85, 1)
        h, w = (round(share * side) for side in photo.shape[:2])
        top, left = rng.integers(photo.shape[0] - h + 1), rng.integers(640 - w + 1)
        part = np.ascontiguousarray(photo[top : top + h, left : left + w])
        path = folder / "train" / f"class{i % 4}" / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        image = cv2.resize(part, (width, height), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 90])
        for copy in range(15):
            os.link(path, path.with_stem(f"{i}-{copy}"))


def main() -> None:
    """Prints the two pipelines' figures and their ratios."""
    from absl import flags

    python = flags.DEFINE_string("tf_python", None, "with tensorflow", required=True)
    crop = flags.DEFINE_integer("crop", 224, "pixels")
    size = flags.DEFINE_list("image_size", ["500", "375"], "width and height in pixels")
    rounds = flags.DEFINE_integer("rounds", 7, "of both")
    count = flags.DEFINE_integer("batches", 30, "that are timed in each round")
    flags.FLAGS(sys.argv)  # Grain reads them too
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        write_photographs(folder, *map(int, size.value))
        given = str(folder), str(crop.value), str(count.value)
        peer = stack.enter_context(
            subprocess.Popen(
                [python.value, __file__, "tf", *given],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
        )

        def theirs() -> tuple[float, ...]:
            print(file=peer.stdin, flush=True)
            return tuple(map(float, peer.stdout.readline().split()))

        def ours() -> tuple[float, ...]:
            return our_rates(folder, crop.value, count.value)

        ways: list[Callable[[], tuple[float, ...]]] = [theirs, ours]
        for way in ways:  # the first takes longer
            way()
        found = [[way() for way in ways] for _ in range(rounds.value)]
        peer.stdin.close()
    print("           images/s  per processor second   (medians)")
    names = "tf.data", "mixer_jax"
    for name, each in zip(names, zip(*found, strict=True), strict=True):
        wall, cpu = (statistics.median(x) for x in zip(*each, strict=True))
        print(f"{name:10} {wall:8.0f} {cpu:10.0f}")
    for i, what in enumerate(("images/s", "images per processor second")):
        ratios = sorted(our[i] / their[i] for their, our in found)
        shown = " ".join(f"{x:.2f}" for x in ratios)
        print(f"{what}: {statistics.median(ratios):.2f} x tf.data ({shown})")


if __name__ == "__main__":
    if sys.argv[1:2] == ["tf"]:
        serve_tf(pathlib.Path(sys.argv[2]), *map(int, sys.argv[3:]))
    else:
        main()
