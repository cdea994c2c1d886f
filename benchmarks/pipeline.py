"""Times the training pipeline on digits, with threads that prepare chunks of examples.

    python benchmarks/pipeline.py

prints how many times as long it takes if each chunk is a single example: the median of
five measurements, and all of them.
"""

import contextlib
import time

from absl import flags

from mixer_jax.data import pipeline
from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.preprocess import TrainTransform

BATCHES = 60


def seconds(chunk: int) -> float:
    """Returns the seconds that 60 batches of 64 take, with chunks of that size."""
    pipeline.CHUNK = chunk
    source = open_dataset("digits").split("train")
    batches = pipeline.train_batches(source, TrainTransform(16), batch_size=64, seed=0)
    with contextlib.closing(batches):
        next(batches)
        start = time.monotonic()
        for _ in range(BATCHES):
            next(batches)
        return time.monotonic() - start


if __name__ == "__main__":
    flags.FLAGS(["pipeline"])  # Grain reads them
    default = pipeline.CHUNK
    ratios = sorted(seconds(1) / seconds(default) for _ in range(5))
    print(f"one by one / in chunks of {default}: {ratios[2]:.2f} ({ratios})")
