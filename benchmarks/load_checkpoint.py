"""Times the loading of a B/16 npz file against numpy reading the same arrays.

    python benchmarks/load_checkpoint.py

writes a file of random numbers with the shapes of a published one, and reads it by
turns with numpy alone and with mixer_jax, which also checks every key, shape, dtype and
value. The file comes from the page cache each time, so the ratio is of work, not of
disks. Memory is what Python and numpy hold at the most, in units of the file.
"""

import argparse
import pathlib
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import mixer_jax
from mixer_jax.variants import get_variant
from mixer_jax.weights import layout


def read_with_numpy(path: pathlib.Path) -> dict[str, np.ndarray]:
    """Reads every array and does nothing else."""
    with np.load(path, allow_pickle=False) as file:
        return dict(file)


def measure_secs(function: Callable[[], Any]) -> float:
    """Returns the seconds of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure_peak_bytes(function: Callable[[], Any]) -> int:
    """Returns the most memory that one call held."""
    tracemalloc.start()
    function()
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak_bytes


def main() -> None:
    """Prints one line for each way of reading."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="B/16", help="a variant")
    parser.add_argument("--num_classes", type=int, default=21843)
    parser.add_argument("--repeats", type=int, default=9)
    args = parser.parse_args()

    sizes = layout.sizes_of(get_variant(args.model), args.num_classes)
    rng = np.random.default_rng(0)
    shapes = sizes.shapes()
    params = {k: rng.standard_normal(s, "float32") for k, s in shapes.items()}
    shape_only = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)  # noqa: E731
    init_params = layout.unflatten(
        {k: x if k.startswith("head/") else shape_only(x) for k, x in params.items()}
    )
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder, "checkpoint.npz")
        mixer_jax.save_checkpoint(path, layout.unflatten(params))
        ways: dict[str, Callable[[], Any]] = {
            "numpy": lambda: read_with_numpy(path),
            "load_checkpoint": lambda: mixer_jax.load_checkpoint(path),
            "load_pretrained": lambda: mixer_jax.load_pretrained(path, init_params),
        }
        secs: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(args.repeats):
            for name, read in ways.items():
                secs[name].append(measure_secs(read))
        file_bytes = path.stat().st_size
        print(f"{sizes}: {file_bytes:,} bytes, median of {args.repeats}")
        for name, read in ways.items():
            # Within a turn the machine is equally busy: compare there.
            ratios = [x / y for x, y in zip(secs[name], secs["numpy"], strict=True)]
            print(
                f"{name:16} {statistics.median(secs[name]):.3f} s, "
                f"{statistics.median(ratios):.2f} x numpy, "
                f"peak memory {measure_peak_bytes(read) / file_bytes:.2f} x file"
            )


if __name__ == "__main__":
    main()
