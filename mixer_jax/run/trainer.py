"""One run: `train_and_evaluate(config, workdir)`.

It reads restore, then in a loop save, evaluate, next batch, step. All that a step
depends on is in the state, or follows from the config's seed and the number of the
step. So a run that was stopped and started again ends with the same parameters as one
that was not.
"""

import contextlib
import logging
import math
import os
import pathlib
import time

import jax

from mixer_jax.run.changes import check_length
from mixer_jax.run.config import Config, ConfigError, flatten, in_steps
from mixer_jax.run.data import Data, open_data, open_evals
from mixer_jax.run.evaluators import EvaluationStopped, open_evaluators
from mixer_jax.run.lock import WorkdirInUseError, locked
from mixer_jax.run.paths import comparable
from mixer_jax.run.program import (
    build_program,
    check_run,
    log_program,
    step_rng,
)
from mixer_jax.run.settings import settings_of_source
from mixer_jax.run.start import check_start, initial_state
from mixer_jax.run.workdir import (
    check_same_data,
    open_workdir,
    recorded_config,
    workdir_path,
    write_description,
    write_result,
)
from mixer_jax.training import sharding
from mixer_jax.training.agreement import (
    check_processes,
    check_same,
    check_same_copies,
    describe_arrays,
)
from mixer_jax.training.checkpointing import Checkpoints
from mixer_jax.training.logs import logging_to
from mixer_jax.training.metrics import NonFiniteError, Reporter
from mixer_jax.training.processes import (
    RunStopped,
    first_process_first,
    stop_requests,
)
from mixer_jax.training.profiling import Profiler

__all__ = [
    "ConfigError",
    "NonFiniteError",
    "RunStopped",
    "WorkdirInUseError",
    "train_and_evaluate",
]

logger = logging.getLogger(__name__)


def train_and_evaluate(
    config: Config, workdir: str | os.PathLike[str]
) -> dict[str, float]:
    """Trains as `config` says, or continues where the run in `workdir` stopped.

    A process may call it several times, one after the other, also while an event loop
    runs, as in a notebook. In a thread other than the main one, SIGTERM and Ctrl-C do
    not stop the run.

    Args:
      config: see configs/common.py.
      workdir: folder for checkpoints, metrics, logs and the result; made if needed.

    Returns:
      the last evaluation of the test split: `top1`, `top5`, `loss` and `count`, and
      `mAP` if images have several labels.

    Raises:
      ConfigError: the config contradicts itself or the one in the workdir, or the data
        are not those that the run began with.
      DatasetError: the dataset is not there or not as expected.
      CheckpointError: the parameters to start from are not there or do not fit.
      DamagedError: the run has checkpoints, and none is whole.
      NonFiniteError: loss or gradient are infinite or not a number.
      ProcessError: another process failed, does not see the workdir, or differs in
        config, code, versions, devices or data.
      RunStopped: SIGTERM, Ctrl-C or max_run_secs; the state has been saved.
      KeyboardInterrupt: SIGTERM or Ctrl-C before the first step, or a second Ctrl-C.
      WorkdirInUseError: another run writes into the workdir.
    """
    start_time = time.monotonic()
    check_processes(comparable(config))
    config, mesh = check_run(config)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        deadline = start_time + (config.max_run_secs or math.inf)
        stop_requested = enter(stop_requests(deadline))
        config, notes = first_process_first(settings_of_source, config, workdir)
        # Each host may have read a file of its own.
        check_same("what the parameters to start from say", comparable(config))
        check_lock = enter(locked(workdir_path(workdir)))
        workdir = open_workdir(config, workdir)
        enter(logging_to(workdir))
        for level, note in notes:
            logger.log(level, note)
        enter(jax.set_mesh(mesh))
        first_process_first(check_start, config, workdir)
        data = first_process_first(open_data, config)
        data = first_process_first(open_evals, data)
        check_same("the dataset", flatten(data.fingerprint))
        given_config, config = config, in_steps(config, len(data.train_source))
        check_same_data(config, data, workdir)
        program = build_program(
            config, mesh, len(data.class_names), multilabel=data.multilabel
        )
        checkpoints = enter(Checkpoints(workdir, config.keep_checkpoints))
        check_same(
            "model, optimizer and step",
            {"step": checkpoints.latest_step()}
            | describe_arrays(program.abstract_state),
        )
        recorded = recorded_config(workdir)
        step = checkpoints.latest_step() or 0
        check_length(config, recorded, len(data.train_source), step)
        if checkpoints.latest_step() is not None:
            state = checkpoints.restore(program.abstract_state)
        else:
            state = initial_state(config, program, data.class_names, mesh)
        start_step = step = checkpoints.latest_step() or 0  # restored
        check_same_copies("the parameters at the start", state.params)
        log_program(config, program, mesh, start_step)
        write_description(given_config, data, workdir, start_step)
        evaluators = open_evaluators(
            config, data, program, mesh, lambda: stop_requested(step)
        )
        batches = enter(data.train_batches(start_step, mesh))
        reporter = enter(_open_reporter(config, data, workdir, checkpoints))
        profiler = enter(Profiler(workdir / "tensorboard", config.profile_steps))
        rng, results = step_rng(config, mesh), dict[str, dict[str, float]]()

        def save() -> None:
            if step > start_step:
                # Raises an error before the save if this step's loss is not finite.
                with reporter.paused():
                    check_lock()
                    reporter.to_disk()
                    checkpoints.save(step, state, reporter.numbers())

        while True:
            is_last = step == config.total_steps
            reason = stop_requested(step)
            if is_last or step % config.checkpoint_every == 0:
                save()
            try:
                for evaluator in [] if reason else evaluators:
                    # At start_step too: a run that ended there may not have evaluated.
                    if is_last or evaluator.is_due(step):
                        with reporter.paused():
                            numbers = evaluator.run(state.params)
                        reporter.report(step, evaluator.name, numbers)
                        results[evaluator.name] = numbers
            except EvaluationStopped as stopped:
                (reason,) = stopped.args
            if reason:
                save()
                checkpoints.wait()
                raise RunStopped(step, config.total_steps, workdir, reason)
            if is_last:
                break
            step += 1
            with profiler.step(step):
                batch = sharding.shard_batch(mesh, next(batches))
                with jax.transfer_guard("disallow"):
                    state, metrics = program.train_step(state, batch, rng)
            reporter.push(step, metrics)

        checkpoints.wait()
        check_lock()
        final = workdir / "final.npz"
        write_result(final, state.params, mesh, overwrite=step > start_step)
        secs = time.monotonic() - start_time
        logger.info("Done in %.0f s. The parameters are in %s", secs, final)
        return results["test"]


def _open_reporter(
    config: Config, data: Data, workdir: pathlib.Path, checkpoints: Checkpoints
) -> Reporter:
    return Reporter(
        workdir,
        checkpoints,
        total_steps=config.total_steps,
        batch=config.batch,
        num_examples=len(data.train_source),
        every=config.progress_every,
        nonfinite_limit=config.nonfinite_limit,
    )
