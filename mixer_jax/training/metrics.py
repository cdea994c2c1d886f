"""What a run tells: log lines, a progress bar, metrics.jsonl, TensorBoard events."""

import contextlib
import json
import logging
import pathlib
import sys
import time
from collections.abc import Iterator, Mapping

import tensorboardX
from tqdm import tqdm

logger = logging.getLogger("mixer_jax")

PROGRESS = logging.DEBUG  # lines that a progress bar makes superfluous


class _ConsoleHandler(logging.Handler):
    """Prints messages above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = (
            f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        )
        tqdm.write(prefix + self.format(record), file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def logging_to(workdir: pathlib.Path, is_main: bool) -> Iterator[None]:
    """Sends this package's messages to <workdir>/train.log and to the console.

    Of several processes one is the main one. The others print warnings and no more.
    """
    handlers: list[logging.Handler] = [_ConsoleHandler()]
    handlers[0].setLevel(logging.INFO if sys.stdout.isatty() else PROGRESS)
    if is_main:
        log = logging.FileHandler(workdir / "train.log", encoding="utf-8")
        log.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(log)
    else:
        handlers[0].setLevel(logging.WARNING)
    logger.setLevel(PROGRESS)
    logger.propagate = False
    for handler in handlers:
        logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()
        logger.propagate = True


class MetricsWriter:
    """Writes numbers by step to metrics.jsonl and to TensorBoard's event files.

    What a run that goes on at `start_step` wrote until then stays as it is, and no row
    of that step is written twice; rows of later steps, which it will write again, are
    dropped.
    """

    def __init__(self, workdir: pathlib.Path, start_step: int, enabled: bool):
        self._enabled, self._start_step = enabled, start_step
        if not enabled:  # another process writes
            return
        path = workdir / "metrics.jsonl"
        rows = path.read_text().splitlines(keepends=True) if path.exists() else []
        kept = [row for row in rows if _step_of(row) <= start_step]
        last = [json.loads(row) for row in kept if _step_of(row) == start_step]
        self._known = {name for row in last for name in row}
        if kept != rows:
            partial = path.with_suffix(".partial")
            partial.write_text("".join(kept))
            partial.replace(path)
        self._file = path.open("a", buffering=1, encoding="utf-8")
        self._events = tensorboardX.SummaryWriter(
            str(workdir / "tensorboard"), purge_step=start_step + 1
        )

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Adds one row; names are like "train/loss"."""
        if not self._enabled:
            return
        if step == self._start_step and self._known.issuperset(values):
            return  # of an evaluation made once more
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self._events.add_scalar(name, value, step)

    def close(self) -> None:
        """Writes what is still in memory."""
        if not self._enabled:
            return
        self._file.close()
        self._events.close()


def _step_of(row: str) -> float:
    try:
        return json.loads(row)["step"]
    except json.JSONDecodeError:  # cut off in the middle
        return float("inf")


class Progress:
    """Speed and time left: a bar on a terminal, a line now and then elsewhere."""

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
