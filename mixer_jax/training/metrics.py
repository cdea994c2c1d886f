"""The numbers of a run: read from the device, shown, and written to files."""

import contextlib
import errno
import json
import logging
import math
import os
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping
from types import TracebackType

import jax
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar
from tqdm import tqdm

from mixer_jax.data.names import listing
from mixer_jax.files import DiskError, replace_when_whole, writing
from mixer_jax.training.checkpointing import Checkpoints
from mixer_jax.training.logs import PROGRESS
from mixer_jax.training.rows import parse_row
from mixer_jax.training.step import Metrics

logger = logging.getLogger(__name__)

FLUSH_SECS = 120.0  # between two writes of TensorBoard's events to the disk

_ADVICE = (
    "A lower base_lr, a longer warmup_steps or a lower grad_norm_clip may help; look "
    "for damaged values in pre-trained parameters too."
)


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is infinite or not a number."""


class Reporter:
    """Shows and writes the numbers of a run: of its steps, and of its evaluations.

    The metrics of a step are read one step late: while they are on the way, the device
    computes the next step. Of the loss a row has the mean over the steps since the last
    row, and of other metrics the value at its step. The mean is one of numbers that are
    read anyway, to see whether they are finite, so it costs no more transfers. Steps
    whose update was skipped are counted, and left out of the mean.
    """

    def __init__(
        self,
        workdir: pathlib.Path,
        checkpoints: Checkpoints,
        *,
        total_steps: int,
        batch: int,
        num_examples: int,
        every: int,
        nonfinite_limit: int,
    ):
        """Opens the files of the run.

        All processes read the metrics; the first one shows and writes them.

        Args:
          workdir: of the run.
          checkpoints: of the run, which continues from the newest one.
          total_steps: of the run.
          batch: images of a step.
          num_examples: images of an epoch.
          every: steps between two rows of metrics.
          nonfinite_limit: the run stops at this many skipped updates in a row.
        """
        self._checkpoints = checkpoints
        self._every, self._epoch_steps = every, num_examples / batch
        self._nonfinite_limit = nonfinite_limit
        start_step, enabled = checkpoints.latest_step() or 0, jax.process_index() == 0
        self._writer = MetricsWriter(workdir, start_step, enabled)
        self._progress = Progress(start_step, total_steps, batch, enabled)
        self._pending: tuple[int, Metrics] | None = None
        # Of the steps since the last row, and of all; of those before a stop as well.
        self._numbers = {
            "loss_sum": 0.0,
            "steps": 0,
            "skipped": 0,
            "skipped_in_a_row": 0,
        } | checkpoints.latest_numbers()

    def numbers(self) -> dict[str, float]:
        """Returns what later rows need of the steps so far, to be kept at a stop."""
        return dict(self._numbers)

    def push(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step just dispatched, and reads the ones before.

        Raises:
          NonFiniteError: the loss or another metric of the step before is not finite,
            and its update was not skipped, or too many in a row were.
        """
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        """Reads what was pushed last, after which it is known to be finite.

        Raises:
          NonFiniteError: it is not.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        may_skip = "skipped" in values
        if values.get("skipped"):
            self._count_skipped(step, values)
        elif not all(math.isfinite(value) for value in values.values()):
            last_good = self._checkpoints.latest_step()
            raise NonFiniteError(
                f"Step {step}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}. The last good checkpoint is "
                f"{self._checkpoints.path / str(last_good) if last_good else 'none'}. "
                f"{_ADVICE} To leave out a few bad batches: --config.on_nonfinite=skip."
            )
        else:
            self._numbers["skipped_in_a_row"] = 0
            self._numbers["loss_sum"] += values["loss"]
            self._numbers["steps"] += 1
        numbers = self._numbers
        is_known = numbers["steps"] > 0
        values["loss"] = (
            numbers["loss_sum"] / numbers["steps"] if is_known else math.nan
        )
        self._progress.update(step, values["loss"])
        if step % self._every == 0:
            values["images_per_sec"] = self._progress.report(step, values)
            values["epoch"] = step / self._epoch_steps
            if may_skip:
                values["skipped"] = numbers["skipped"]
            row = {f"train/{k}": v for k, v in values.items() if math.isfinite(v)}
            self._writer.write(step, row)
            numbers["loss_sum"] = numbers["steps"] = 0

    def _count_skipped(self, step: int, values: Mapping[str, float]) -> None:
        self._numbers["skipped"] += 1
        self._numbers["skipped_in_a_row"] += 1
        in_a_row = self._numbers["skipped_in_a_row"]
        found = f"loss {values['loss']}, gradient norm {values['grad_norm']}"
        if in_a_row >= self._nonfinite_limit:
            raise NonFiniteError(
                f"Step {step}: {found}; the updates of {in_a_row:.0f} steps in a row "
                f"were skipped, as many as nonfinite_limit. {_ADVICE}"
            )
        if self._writer.enabled:
            logger.warning(
                "step %d  %s: the update is skipped, %d so far in this run",
                step,
                found,
                self._numbers["skipped"],
            )

    def report(self, step: int, name: str, numbers: Mapping[str, float]) -> None:
        """Shows and writes what an evaluator gave.

        Args:
          step: number of updates of the parameters that were scored.
          name: of the evaluator.
          numbers: from its names to accuracies, a loss or a count.

        Raises:
          NonFiniteError: the loss is not finite.
        """
        if not math.isfinite(numbers.get("loss", 0.0)):
            checkpoint = self._checkpoints.path / str(step)
            raise NonFiniteError(
                f"Step {step}: the loss on {name} is {numbers['loss']}: the last "
                f"update went wrong, and {checkpoint} is of no use, if it exists. "
                "A lower base_lr or grad_norm_clip may help."
            )
        count = f", on {numbers['count']:,.0f} images" if "count" in numbers else ""
        shown = [
            f"loss {value:.4f}"
            if key == "loss"
            else f"{key.replace('top', 'top-').replace('shot', '-shot')} {value:.2%}"
            for key, value in numbers.items()
            if key != "count"
        ]
        logger.info("step %d  %s: %s%s", step, name, ", ".join(shown), count)
        self._writer.write(step, {f"{name}/{k}": v for k, v in numbers.items()})

    def to_disk(self) -> None:
        """Waits until the rows so far are on the disk, as before a checkpoint.

        A machine that is reset then lacks no row of a step that it does not repeat.

        Raises:
          DiskError: they cannot be written.
        """
        self._writer.to_disk()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Flushes, and does not count what happens inside as training time.

        Raises:
          NonFiniteError: from the flush.
        """
        self.flush()
        with self._progress.paused():
            yield

    def __enter__(self) -> "Reporter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Clears the bar, closes the files; an error inside the block comes first."""
        self._progress.close()
        try:
            self._writer.close()
        except OSError as close_error:
            if error is None:
                raise
            if not isinstance(error, DiskError):  # one message for a full disk
                logger.warning("%s", close_error)


class MetricsWriter:
    """Writes numbers by step to metrics.jsonl and to TensorBoard's event files.

    A run that continues from `start_step` keeps the rows up to that step, and writes
    none of that step twice. It drops the rows of later steps: it writes them again. So
    a row that cannot be written is an error at once: nothing is lost but the steps
    since the newest checkpoint.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int, enabled: bool):
        self.enabled, self._start_step = enabled, start_step
        if not enabled:  # another process writes
            return
        self._path, self._folder = workdir / "metrics.jsonl", workdir / "tensorboard"
        self._known = _keep_rows(self._path, start_step)
        with writing(self._path):
            # Without a buffer, a row that does not fit leaves nothing to write later.
            self._file = self._path.open("ab", buffering=0)
        with writing(self._folder):
            self._folder.mkdir(exist_ok=True)
            # Not SummaryWriter: its thread ends where the disk is full, and whoever
            # writes then waits for ever.
            self._events = EventsWriter(str(self._folder / "events"))
            start = SessionLog(status=SessionLog.START)
            # TensorBoard then hides what an earlier start wrote from this step on.
            self._events.write_event(Event(step=start_step + 1, session_log=start))
        self._flushed_at = -math.inf

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one row, of names such as "train/loss".

        Raises:
          DiskError: it cannot be written, or the file is not in the workdir any more.
        """
        if not self.enabled:
            return
        if step == self._start_step and self._known.issuperset(values):
            return  # this evaluation was made before
        row = (json.dumps({"step": step, **values}) + "\n").encode()
        with writing(self._path):
            while row:  # a disk that is nearly full takes a part
                row = row[self._file.write(row) :]
            if not os.path.samestat(os.fstat(self._file.fileno()), self._path.stat()):
                raise FileNotFoundError(errno.ENOENT, "replaced", str(self._path))
        with writing(self._folder):
            for name, value in values.items():
                event = Event(
                    wall_time=time.time(), step=step, summary=scalar(name, value)
                )
                self._events.write_event(event)
            if time.monotonic() - self._flushed_at > FLUSH_SECS:
                self._events.flush()
                self._flushed_at = time.monotonic()

    def to_disk(self) -> None:
        """Waits until metrics.jsonl is on the disk.

        Raises:
          DiskError: it cannot be written.
        """
        if self.enabled:
            with writing(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        """Closes the files.

        Raises:
          DiskError: the last numbers cannot be written.
        """
        if not self.enabled:
            return
        with writing(self._path):
            self._file.close()
        with writing(self._folder):
            self._events.close()


def _keep_rows(path: pathlib.Path, last_step: int) -> set[str]:
    """Removes the rows after a step; returns the names of the numbers at that step.

    What is damaged is removed too. If rows follow that stay, a warning says so.
    """
    if not path.exists():
        return set()
    with path.open("rb") as file:
        lines = file.readlines()
    rows = {i: parse_row(line) for i, line in enumerate(lines)}
    kept = {i: row for i, row in rows.items() if row and row["step"] <= last_step}
    damaged = [i + 1 for i in range(max(kept, default=0)) if not rows[i]]
    if damaged:
        numbers = listing(list(map(str, damaged)))
        logger.warning("%s: damaged, and removed, are the lines %s", path, numbers)
    whole = [lines[i].rstrip(b"\n") + b"\n" for i in kept]
    if whole != lines:
        with replace_when_whole(path) as partial:
            partial.write_bytes(b"".join(whole))
    last = [row for row in kept.values() if row["step"] == last_step]
    return {name for row in last for name in row}


class Progress:
    """Speed and time left: as a bar on a terminal, as lines in other outputs."""

    def __init__(self, start_step: int, total_steps: int, batch: int, console: bool):
        self._total_steps, self._batch = total_steps, batch
        self._reported_step, self._reported_time = start_step, time.monotonic()
        self._paused_secs = 0.0
        self._bar = tqdm(
            initial=start_step,
            total=total_steps,
            unit=" images",
            unit_scale=batch,
            bar_format="{desc} |{bar}| {rate_fmt}, {remaining} left",
            disable=not (console and sys.stdout.isatty()),
            file=sys.stdout,
            dynamic_ncols=True,
            leave=False,
        )

    def update(self, step: int, loss: float) -> None:
        """Moves the bar by one step."""
        self._bar.set_description_str(
            f"step {step}/{self._total_steps}, loss {loss:.4f}", refresh=False
        )
        self._bar.update()

    def report(self, step: int, values: Mapping[str, float]) -> float:
        """Returns images per second since the last report; prints a line with it."""
        secs = time.monotonic() - self._reported_time - self._paused_secs
        per_sec = (step - self._reported_step) * self._batch / max(secs, 1e-9)
        secs_left = (self._total_steps - step) * self._batch / per_sec
        self._reported_step, self._reported_time = step, time.monotonic()
        self._paused_secs = 0.0
        logger.log(
            PROGRESS,
            "step %*d/%d  loss %.4f  lr %.2e  %.0f images/s  %s left",
            len(str(self._total_steps)),
            step,
            self._total_steps,
            values["loss"],
            values["learning_rate"],
            per_sec,
            tqdm.format_interval(secs_left),
        )
        return per_sec

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Does not count what happens inside as training time."""
        start = time.monotonic()
        yield
        self._paused_secs += time.monotonic() - start

    def close(self) -> None:
        """Clears the bar."""
        self._bar.close()
