"""A trace of some steps of a run, by jax.profiler."""

import contextlib
import logging
import pathlib
from collections.abc import Iterator

import jax

logger = logging.getLogger(__name__)

# Steps before the first one that is traced: one compiles, and others fill the queues.
WARMUP_STEPS = 3


class Profiler(contextlib.AbstractContextManager["Profiler"]):
    """Traces steps for TensorBoard's profile plugin."""

    def __init__(self, folder: pathlib.Path, num_steps: int):
        """Traces nothing yet.

        Args:
          folder: where the trace is written, under plugins/profile.
          num_steps: how many steps are traced, after WARMUP_STEPS of this start of the
            run; 0 for none.
        """
        self._folder, self._num_steps = folder, num_steps
        self._seen = 0  # steps of this start of the run
        self._is_tracing = False

    @contextlib.contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Marks what happens inside as one step of the trace."""
        if self._num_steps and self._seen == WARMUP_STEPS:
            jax.profiler.start_trace(self._folder)
            self._is_tracing = True
        # The device may still compute the last of these steps while the next one is
        # dispatched. When that has been, its metrics have been read: it is done.
        elif self._seen == WARMUP_STEPS + self._num_steps + 1:
            self._stop()
        self._seen += 1
        with jax.profiler.StepTraceAnnotation("train", step_num=step):
            yield

    def _stop(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()
            steps = min(self._seen - WARMUP_STEPS, self._num_steps)
            logger.info("profile  of %d steps in %s", steps, self._folder)

    def __exit__(self, *error: object) -> None:
        """Ends the trace, if the run ends in it."""
        self._stop()
        if self._num_steps and self._seen <= WARMUP_STEPS:
            logger.warning(
                "profile_steps: nothing is traced, for the run made no more than %d "
                "steps in this start",
                self._seen,
            )
