"""How a run ends early: another process fails, or it is asked to stop."""

import math
import os
import pathlib
import threading
import time
from collections.abc import Sequence

from mixer_jax.training.store import Store

# How long the other processes have to answer.
ANSWER_SECS = 6.0


# The exit status of a program whose run stopped as it was asked to, by a signal or by
# max_run_secs: EX_TEMPFAIL of sysexits.h, "try again later". It is the same for all
# requests, so that a script can test one number. 128 plus a signal's number would not
# do: shells give it for a process that a signal killed, as when memory is short.
STOPPED_STATUS = os.EX_TEMPFAIL  # 75


# The reason to stop that is no signal: the key of a config that limits a run's time.
TIME_LIMIT = "max_run_secs"


class ProcessError(RuntimeError):
    """The processes of a run cannot be connected, differ, or another one failed."""


class RunStopped(Exception):  # noqa: N818 - it is no error
    """A signal or max_run_secs ended the run. What it had computed is saved."""

    def __init__(self, step: int, total_steps: int, workdir: pathlib.Path, reason: str):
        """Takes what was done, and the `reason`, such as "SIGTERM"."""
        text = f"Stopped by {reason} before the first step; nothing is lost."
        if step:
            text = (
                f"Stopped at step {step} of {total_steps} by {reason}. The same "
                f"command continues from there, in {workdir}."
            )
        super().__init__(text)


def exit_status(error: BaseException | None) -> int:
    """Returns the exit status of a program that `error` ends, or that None ends."""
    if error is None:
        return 0
    asked_for = isinstance(error, RunStopped | KeyboardInterrupt)
    return STOPPED_STATUS if asked_for else 1


class Deadline:
    """Limits the time of a run. It counts after the first step of each start.

    Attributes:
      first_step: number of steps done at the first question; -1 before.
    """

    def __init__(self, at: float):
        """Takes the end of the run, by this process's time.monotonic()."""
        self.first_step, self._at = -1, at

    def is_over(self, step: int) -> bool:
        """Returns whether the run is to stop, with so many steps done."""
        if self.first_step < 0:
            self.first_step = step
        return step > self.first_step and time.monotonic() > self._at


class Stop:
    """Whether one run of several processes stops, and after which of its calls.

    The main thread calls `requested` with each step, and within evaluations, as often
    in each process; another thread calls `poll` again and again.

    Attributes:
      step: that this process has done; -1 before the run asks for the first time.
      signal: name of the signal that this process got, or "".
      unanswered: processes that have not told how far they are.
      is_over: whether the run has ended here.
    """

    def __init__(self, number: int, index: int, count: int, store: Store):
        """Starts without a request.

        Args:
          number: of the run in this program. Runs do not share their keys.
          index: of this process.
          count: of all processes.
          store: of all processes.
        """
        self.step, self.signal, self.is_over = -1, "", False
        self.unanswered = [0]
        self._folder = f"stop/{number}/"
        self._index, self._count, self._store = index, count, store
        # Of the calls: a process that has told the others their number stays there.
        self._lock = threading.Lock()
        self._calls, self._told, self._last_call = 0, False, -1
        self._wish = self._reason = ""
        self._answer_at = math.inf

    def requested(self, step: int) -> str:
        """Returns why all processes stop at this call, such as "SIGTERM", or ""."""
        with self._lock:
            self.step = step
            self._calls += 1
            return self._reason if 0 <= self._last_call <= self._calls else ""

    def ask(self, reason: str) -> None:
        """Asks all processes to stop."""
        if not self._wish:
            self._wish, self._answer_at = reason, time.monotonic() + ANSWER_SECS

    def request(self, name: str) -> bool:
        """Asks all processes to stop, for a signal; returns whether it can.

        It cannot before the first step or after the run, and not for a second signal.
        A process that stops already may get its first signal late, even in the end.
        """
        ends_as_asked = self.is_over and self._last_call >= 0
        if self.step < 0 or self.signal or (self.is_over and not ends_as_asked):
            return False
        self.signal = name
        self.ask(name)
        return True

    def describe_loss(self) -> str:
        """Says what is lost if this process ends at once."""
        is_saved = self.step < 0 or self.is_over
        return "Nothing is lost." if is_saved else "Nothing was saved."

    def is_late(self) -> bool:
        """Returns whether the other processes had to answer before now."""
        is_open = self._last_call < 0 and not self.is_over
        return is_open and time.monotonic() > self._answer_at

    def is_agreeing(self) -> bool:
        """Returns whether it is still unknown how far another process is."""
        return self._told and self._last_call < 0

    def poll(self) -> None:
        """Finds the call at which all processes stop: the next of the foremost.

        A process that has told its number of calls does not go on until all have.
        """
        if self._last_call >= 0:
            return
        if self._wish:
            self._store.write(f"{self._folder}asked/{self._index}", self._wish)
        asked = self._store.read(f"{self._folder}asked/")
        if not asked:
            return
        if not self._told:
            self._lock.acquire()
            self._told = True
            now = time.monotonic()
            self._answer_at = min(self._answer_at, now + ANSWER_SECS)
        told = f"{self._calls} {asked[min(asked)]}"
        self._store.write(f"{self._folder}calls/{self._index}", told)
        answers = self._store.read(f"{self._folder}calls/")
        self.unanswered = [i for i in range(self._count) if i not in answers]
        if not self.unanswered:
            self._last_call = max(int(x.split()[0]) for x in answers.values()) + 1
            self._reason = answers[0].split()[1]  # one for all, if several asked
            self._lock.release()


def process_names(indices: Sequence[int]) -> str:
    """Names processes: "process 1", "processes 1, 2"."""
    listed = ", ".join(map(str, indices[:8])) + (", …" if len(indices) > 8 else "")
    return f"process{'es' if len(indices) > 1 else ''} {listed}"
