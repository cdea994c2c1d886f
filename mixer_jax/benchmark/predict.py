"""Predictions from image files, as `mixer-jax predict` makes them."""

import itertools
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mixer_jax.benchmark.report import Row
from mixer_jax.benchmark.timing import take_turns
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.data.sizes import as_size, size_text
from mixer_jax.evaluation.prediction import predict
from mixer_jax.run.config import Config
from mixer_jax.run.program import build_program

# Files given to one call of `predict`: more than all measurements take from it.
MANY = 100_000


def benchmark_predict(
    config: Config,
    mesh: Mesh,
    num_classes: int,
    transform: EvalTransform,
    files: Sequence[pathlib.Path],
    batches: Sequence[int],
    repeats: int,
) -> Iterator[Row]:
    """Measures from files to probabilities, with new parameters.

    Args:
      config: of the run.
      mesh: of the run.
      num_classes: of the model.
      transform: of the run's test images.
      files: images.
      batches: how many images at a time; 1 for the latency.
      repeats: measurements of each.

    Yields:
      A row for each of `batches`.
    """
    program = build_program(config, mesh, num_classes)
    state = program.init(jax.random.key(config.seed))
    params = jax.device_get(state.params)  # as from a file
    del state
    for batch in batches:
        count = max(MANY, 100 * batch) // batch * batch
        names = list(itertools.islice(itertools.cycle(map(str, files)), count))
        found: Any = predict(program.model, params, transform, names, batch_size=batch)

        def call(found: Any = found, batch: int = batch) -> None:
            for _ in range(batch):
                next(found)

        timing = take_turns({"": call}, lambda none: none, repeats)[""]
        found.close()
        yield {
            "model": config.model.get("model_name") or "-",
            "pixels": size_text(as_size(config.pp.crop)),
            "dtype": str(config.model.get("dtype", "-")),
            "batch": batch,
            "secs": timing.spread,
            "images/s": timing.per_sec(batch),
        }
