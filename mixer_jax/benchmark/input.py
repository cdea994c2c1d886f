"""A run's input pipelines, alone and while it trains."""

import contextlib
import dataclasses
import time
from collections.abc import Generator, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mixer_jax.benchmark.report import Row
from mixer_jax.benchmark.timing import Spread, Timing, take_turns
from mixer_jax.data.dataset import Subset
from mixer_jax.data.sizes import as_size, size_text
from mixer_jax.data.workers import num_cores
from mixer_jax.run.config import Config, in_steps
from mixer_jax.run.data import Data, num_workers, open_data
from mixer_jax.run.evaluators import open_evaluators
from mixer_jax.run.program import Program, build_program, step_rng
from mixer_jax.training import sharding

LEAST_SECS = 1.0  # of a measurement, so that it has many batches of small images
LEAST_STEPS = 5  # of a measurement of a run that trains
EVAL_BATCHES = 4  # of an evaluation


def with_dataset(config: Config, name: str) -> Config:
    """Returns a copy of a config for another dataset, with the usual splits of it."""
    config = config.copy_and_resolve_references()
    config.dataset = name
    config.label_key = config.pp.train = config.pp.test = None
    return config


def benchmark_input(
    configs: Mapping[str, Config], mesh: Mesh, repeats: int
) -> Iterator[Row]:
    """Measures how many images the pipelines make when nothing else is done.

    Args:
      configs: of a run on each source, by a name for it.
      mesh: of the run.
      repeats: measurements of each.

    Yields:
      A row for each source and kind of pipeline.
    """
    for name, config in configs.items():
        data, config, program = _open(config, mesh)
        rows = config.total_steps * config.batch
        workers = num_workers(config, data.train_source, rows)
        with data.train_batches(0, mesh) as batches:
            for _ in range(config.prefetch + 1):  # they were made ahead
                next(batches)
            turns = {"training": lambda batches=batches: next(batches)}
            found = take_turns(turns, lambda batch: batch, repeats, LEAST_SECS)
        timing = found["training"]
        yield _row(name, config, "training", timing, config.batch, workers)

        count = EVAL_BATCHES * config.batch_eval
        indices = [i % len(data.test_source) for i in range(count)]
        data = dataclasses.replace(data, test_source=Subset(data.test_source, indices))
        scoring = dataclasses.replace(program, eval_step=_count)
        test = open_evaluators(config, data, scoring, mesh)[0]
        turns = {"evaluation": lambda test=test: test.run(None)}
        found = take_turns(turns, lambda numbers: numbers, repeats, LEAST_SECS)
        yield _row(name, config, "evaluation", found["evaluation"], count, workers)


@jax.jit
def _count(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Stands for the evaluation's step, and takes no time."""
    del params
    return {"count": jnp.sum(batch["mask"])}


def _open(config: Config, mesh: Mesh) -> tuple[Data, Config, Program]:
    data = open_data(config)
    config = in_steps(config, len(data.train_source))
    data = dataclasses.replace(data, config=config)
    classes, multilabel = len(data.class_names), data.multilabel
    return data, config, build_program(config, mesh, classes, multilabel=multilabel)


def _row(
    name: str, config: Config, kind: str, timing: Timing, images: int, workers: int
) -> Row:
    cpu = Spread.of(1e3 * x / images for x in timing.cpu_secs)
    return {
        "source": name,
        "pipeline": kind,
        "pixels": size_text(as_size(config.pp.crop)),
        "images/s": timing.per_sec(images),
        "images/s a core": timing.per_sec(images / num_cores()),
        # What other processes take is not known.
        "cpu ms an image": None if workers else cpu,
    }


def benchmark_wait(
    configs: Mapping[str, Config], mesh: Mesh, repeats: int
) -> Iterator[Row]:
    """Measures what share of its time a run that trains waits for the next batch.

    A step does what one of a run does: it takes a batch, sends it to the devices,
    starts the training step, and reads the metrics of the step before.

    Args:
      configs: of a run on each source, by a name for it.
      mesh: of the run.
      repeats: measurements of each.

    Yields:
      A row for each source.
    """
    for name, config in configs.items():
        data, config, program = _open(config, mesh)
        shares, per_sec = [], []
        with contextlib.closing(_loop(data, config, program, mesh)) as loop:
            for _ in range(config.prefetch + 2):  # the first one compiles
                _, secs = next(loop)
            steps = max(LEAST_STEPS, round(LEAST_SECS / secs))
            for _ in range(repeats):
                waits, times = zip(*(next(loop) for _ in range(steps)), strict=True)
                shares.append(sum(waits) / sum(times))
                per_sec.append(steps * config.batch / sum(times))
        yield {
            "source": name,
            "images": len(data.train_source),
            "model": config.model.get("model_name") or "-",
            "pixels": size_text(as_size(config.pp.crop)),
            "batch": config.batch,
            "images/s": Spread.of(per_sec),
            "share waiting": Spread.of(shares),
        }


def _loop(
    data: Data, config: Config, program: Program, mesh: Mesh
) -> Generator[tuple[float, float], None, None]:
    """Trains; yields for each step the seconds of the wait for its batch, and of it."""
    state = program.init(jax.random.key(config.seed))
    rng, pending = step_rng(config, mesh), None
    with data.train_batches(0, mesh) as batches:
        while True:
            start = time.perf_counter()
            rows = next(batches)
            wait_secs = time.perf_counter() - start
            batch = sharding.shard_batch(mesh, rows)
            state, metrics = program.train_step(state, batch, rng)
            jax.device_get(pending)
            pending = metrics
            yield wait_secs, time.perf_counter() - start
