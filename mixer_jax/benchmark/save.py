"""How long a run's loop waits when it saves, and how long the save takes."""

import pathlib
import time
from typing import Any

import jax
from jax.sharding import Mesh

from mixer_jax.benchmark.report import Row
from mixer_jax.benchmark.timing import Spread
from mixer_jax.run.config import Config
from mixer_jax.run.program import build_program
from mixer_jax.training.checkpointing import Checkpoints


def benchmark_save(
    config: Config, mesh: Mesh, num_classes: int, folder: pathlib.Path, repeats: int
) -> Row:
    """Measures saves of the run's whole state.

    The loop waits for the call alone: the rest happens beside the next steps. A save
    that blocks would take both. They are written to the disk, read back and hashed.

    Args:
      config: of the run.
      mesh: of the run.
      num_classes: of the model.
      folder: on the disk to measure.
      repeats: saves.
    """
    program = build_program(config, mesh, num_classes)
    state: Any = jax.block_until_ready(program.init(jax.random.key(config.seed)))
    pauses, wholes = [], []
    with Checkpoints(folder, keep=1) as checkpoints:
        for step in range(repeats + 1):
            start = time.perf_counter()
            checkpoints.save(step + 1, state)
            pause = time.perf_counter() - start
            checkpoints.wait()
            if step:  # the first one makes folders and compiles
                pauses.append(pause)
                wholes.append(time.perf_counter() - start)
    pairs = zip(pauses, wholes, strict=True)
    return {
        "model": config.model.get("model_name") or "-",
        "MB": sum(x.nbytes for x in jax.tree.leaves(state)) / 1e6,
        "secs the loop waits": Spread.of(pauses),
        "secs of a save": Spread.of(wholes),
        "share of a save": Spread.of(pause / whole for pause, whole in pairs),
    }
