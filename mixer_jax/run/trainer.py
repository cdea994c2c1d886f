"""One run: `train_and_evaluate(config, workdir)`.

The loop reads evaluate, save, next batch, step. What a step depends on is in the state,
or follows from the config's seed and the step's number; so a run that was stopped goes
on as if it had not been.
"""

import contextlib
import logging
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mixer_jax.run.config import (
    Config,
    ConfigError,
    check_config,
    check_devices,
    for_platform,
    in_steps,
)
from mixer_jax.run.data import open_data
from mixer_jax.run.evaluators import Evaluator, open_evaluators
from mixer_jax.run.program import build_program, initial_state
from mixer_jax.run.workdir import (
    as_json,
    check_resumable,
    check_workdir,
    write_workdir,
)
from mixer_jax.training import sharding
from mixer_jax.training.checkpointing import Checkpoints
from mixer_jax.training.metrics import MetricsWriter, Progress, logging_to
from mixer_jax.training.processes import check_shared, first_process_first
from mixer_jax.training.step import Metrics, TrainState
from mixer_jax.weights.npz import save_checkpoint

logger = logging.getLogger(__name__)


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is infinite or not a number."""


class RunStopped(Exception):  # noqa: N818 - it is no error
    """A signal asked the run to stop, and its state has been saved."""


def train_and_evaluate(
    config: Config, workdir: str | os.PathLike[str]
) -> dict[str, float]:
    """Trains as `config` says, or goes on where the run in `workdir` stopped.

    Args:
      config: see configs/common.py.
      workdir: folder for checkpoints, metrics, logs and the result; made if needed.

    Returns:
      the last evaluation of the test split: `top1`, `top5`, `loss` and `count`.

    Raises:
      ConfigError: the config contradicts itself or the one in the workdir.
      DatasetError: the dataset is not there or not as expected.
      CheckpointError: the pre-trained parameters are not there or do not fit.
      NonFiniteError: loss or gradient are infinite or not a number.
      ProcessError: another process failed, or does not see the workdir.
      RunStopped: SIGTERM or Ctrl-C; the state has been saved.
    """
    start_time = time.monotonic()
    if "://" in os.fspath(workdir):
        raise ConfigError(
            f"The workdir is {os.fspath(workdir)}, a URL. It must be a folder."
        )
    workdir = pathlib.Path(workdir).expanduser().absolute()
    config = for_platform(config, jax.devices()[0].platform)
    check_config(config)
    check_devices(config, jax.device_count())
    workdir.mkdir(parents=True, exist_ok=True)
    check_shared(workdir)
    check_workdir(config, workdir)
    saved_config = as_json(config)
    is_main = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(workdir, is_main))
        stop_requested = stack.enter_context(_stop_signals())
        mesh = sharding.create_mesh(config.mesh.fsdp)
        stack.enter_context(jax.set_mesh(mesh))
        data = first_process_first(lambda: open_data(config))
        config = in_steps(config, len(data.train_source))
        program = build_program(config, mesh, len(data.class_names))
        init_rng, rng = jax.random.split(jax.random.key(config.seed))
        rng = jax.device_put(rng, sharding.replicated(mesh))

        checkpoints = Checkpoints(workdir, config.keep_checkpoints)
        stack.enter_context(checkpoints)
        start_step = checkpoints.latest_step() or 0
        check_resumable(config, data, start_step, workdir)
        if start_step:
            state = checkpoints.restore(program.abstract_state)
            if start_step == config.total_steps:
                logger.info("This run is finished; evaluating it once more.")
            else:
                logger.info("start    from the checkpoint of step %d", start_step)
        else:
            state = initial_state(config, program, init_rng)
        _describe(config, mesh, state)
        write_workdir(saved_config, data.class_names, workdir)
        evaluators = first_process_first(
            lambda: open_evaluators(config, data, program, mesh)
        )

        progress = Progress(start_step, config.total_steps, config.batch, is_main)
        stack.enter_context(contextlib.closing(progress))
        writer = MetricsWriter(workdir, start_step, enabled=is_main)
        stack.enter_context(contextlib.closing(writer))
        epoch = len(data.train_source) / config.batch  # in steps
        reader = _MetricsReader(
            writer, progress, config.progress_every, epoch, checkpoints
        )
        rows = sharding.local_rows(mesh, config.batch)
        train_batches = data.train_batches(start_step, rows)
        stack.enter_context(contextlib.closing(train_batches))

        step = start_step
        results: dict[str, dict[str, float]] = {}
        while True:
            is_last = step == config.total_steps
            stopping = stop_requested() or checkpoints.reached_preemption(step)
            if stopping and step > start_step:  # what stops us may not wait for more
                reader.flush()
                checkpoints.save(step, state)
                checkpoints.wait()
            if stopping and not is_last:
                break
            for evaluator in evaluators:
                # At start_step too: a run that stopped there may not have evaluated.
                if is_last or (step > 0 and step % evaluator.every == 0):
                    reader.flush()
                    with progress.paused():
                        results[evaluator.name] = evaluator.run(state.params)
                    _report_evaluation(step, evaluator, results, writer)
            due = is_last or step % config.checkpoint_every == 0
            if due and step > start_step:
                reader.flush()  # only a state with a finite loss is saved
                with progress.paused():
                    checkpoints.save(step, state)
            if is_last:
                break
            batch = sharding.shard_batch(mesh, next(train_batches))
            with jax.transfer_guard("disallow"):
                state, metrics = program.train_step(state, batch, rng)
            step += 1
            reader.push(step, metrics)

        checkpoints.wait()
        progress.close()
        if step == 0:
            raise RunStopped("Stopped before the first step; nothing is lost.")
        if not is_last:
            raise RunStopped(
                f"Stopped at step {step} of {config.total_steps}. The state is in "
                f"{checkpoints.path}; the same command goes on from there."
            )
        final = workdir / "final.npz"
        missing = multihost_utils.broadcast_one_to_all(np.int32(not final.exists()))
        if step > start_step or missing:
            _save_params(final, state.params, mesh)
        secs = time.monotonic() - start_time
        logger.info("Done in %.0f s. The parameters are in %s", secs, final)
        return results["test"]


# --- What a run tells ---


class _MetricsReader:
    """Reads the metrics of a step while the device computes the next one."""

    def __init__(
        self,
        writer: MetricsWriter,
        progress: Progress,
        every: int,
        epoch_steps: float,
        checkpoints: Checkpoints,
    ):
        self._writer, self._progress = writer, progress
        self._every, self._epoch_steps = every, epoch_steps
        self._checkpoints = checkpoints
        self._pending: tuple[int, Metrics] | None = None

    def push(self, step: int, metrics: Metrics) -> None:
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not all(math.isfinite(value) for value in values.values()):
            last_good = self._checkpoints.latest_step()
            raise NonFiniteError(
                f"Step {step}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}. The last good checkpoint is "
                f"{self._checkpoints.path / str(last_good) if last_good else 'none'}. "
                "A lower base_lr, a longer warmup_steps or a lower grad_norm_clip may "
                "help; look for damaged values in pre-trained parameters too."
            )
        self._progress.update(step, values["loss"])
        if step % self._every == 0:
            values["images_per_sec"] = self._progress.report(step, values)
            values["epoch"] = step / self._epoch_steps
            self._writer.write(step, {f"train/{k}": v for k, v in values.items()})


def _report_evaluation(
    step: int,
    evaluator: Evaluator,
    results: dict[str, dict[str, float]],
    writer: MetricsWriter,
) -> None:
    numbers = results[evaluator.name]
    if not math.isfinite(numbers.get("loss", 0.0)):
        raise NonFiniteError(
            f"Step {step}: the loss on {evaluator.name} is {numbers['loss']}: the last "
            "update went wrong. A lower base_lr or grad_norm_clip may help."
        )
    count = f", on {numbers['count']:,.0f} images" if "count" in numbers else ""
    shown = [
        f"loss {value:.4f}"
        if name == "loss"
        else f"{name.replace('top', 'top-').replace('shot', '-shot')} {value:.2%}"
        for name, value in numbers.items()
        if name != "count"
    ]
    logger.info("step %d  %s: %s%s", step, evaluator.name, ", ".join(shown), count)
    writer.write(step, {f"{evaluator.name}/{k}": v for k, v in numbers.items()})


def _describe(config: Config, mesh: Mesh, state: TrainState) -> None:
    count = sum(x.size for x in jax.tree.leaves(state.params))
    logger.info(
        "model    %s: %s parameters, %d x %d pixels",
        config.model.model_name,
        f"{count:,}",
        config.pp.crop,
        config.pp.crop,
    )
    logger.info(
        "run      %s steps of %d images in %s on %d x %s%s",
        f"{config.total_steps:,}",
        config.batch,
        config.model.dtype,
        mesh.size,
        mesh.devices.flat[0].device_kind,
        f", state split over {config.mesh.fsdp}" if config.mesh.fsdp > 1 else "",
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Makes SIGTERM and Ctrl-C a request to stop after the step; a second one acts.

    Processes that must agree on the step hear of it through Orbax instead.
    """
    requested = threading.Event()

    def request(number: int, frame: Any) -> None:
        del frame
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        logger.info(
            "%s: stopping after this step. Once more to stop at once, without saving.",
            signal.Signals(number).name,
        )

    if (
        jax.process_count() > 1
        or threading.current_thread() is not threading.main_thread()
    ):
        yield lambda: False
        return
    old = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requested.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


def _save_params(path: pathlib.Path, params: Any, mesh: Mesh) -> None:
    """Writes parameters in the published layout, by one process."""
    everywhere = sharding.replicated(mesh)
    whole = jax.jit(lambda x: x, out_shardings=everywhere)(params)
    if jax.process_index() == 0:
        save_checkpoint(path, jax.device_get(whole))
    multihost_utils.sync_global_devices("final parameters written")
