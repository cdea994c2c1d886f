"""What one process knows of the others, and what ends a wait for one of them.

While the main thread is inside XLA, as in a training step that needs another process,
no signal handler of Python runs. So two threads watch: one for signals and for how long
a wait may take, and one that asks the other processes, through a store of values.
"""

import atexit
import contextlib
import logging
import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import jax
from jax.errors import JaxRuntimeError

from mixer_jax.training.stopping import (
    ANSWER_SECS,
    TIME_LIMIT,
    Deadline,
    ProcessError,
    RunStopped,
    Stop,
    exit_status,
    process_names,
)
from mixer_jax.training.store import Store

logger = logging.getLogger(__name__)

# Seconds after which each process writes and reads a few short values again.
POLL_SECS = 1.0

# After this time without a sign of life a process is lost. It is less than the 100 s
# after which JAX aborts, so that a message of ours says for whom this process waited.
LOST_SECS = 60.0

# How long a process waits for another one that is alive, if that has no work to do.
WAIT_SECS = 300.0

# A signal ends a process within 10 s. Until ANSWER_SECS the others may answer, until
# LEAVE_SECS Python may end in order.
LEAVE_SECS = 8.0

# How long JAX may wait at the end for others, if a process failed or does not end.
SHUTDOWN_SECS = 15.0

# Processes fail together, as when a loss is not finite: each may say so itself.
FAIL_SECS = 3.0

_RESTART = "Start all again: they continue from the newest checkpoint."
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Watch:
    """This process among those of a run.

    At the end of the program a process waits for the others.

    Attributes:
      doing: what the main thread does, for messages: "while {doing}".
      index: of this process, from 0.
      count: of all processes.
    """

    def __init__(self, doing: str, limit_secs: float, error: ProcessError):
        """Starts to watch for signals, in place of the handlers that Python has.

        `error` ends this process if `connected` is not called in so many seconds.
        """
        self.doing, self.index, self.count = doing, 0, 1
        self._store: Any = None  # of all processes, once connected
        self._exchanges = 0
        self._failure: ProcessError | None = error  # later: of another process
        self._error: BaseException | None = None  # to be raised by the main thread
        self._last_words: BaseException | None = None  # if the main thread cannot
        self._left = self._closed = False
        self._status = 1  # the program's, if it ends now
        self._end_at = self._leave_at = math.inf
        self._fail_at = time.monotonic() + limit_secs
        self._silence = 0.0
        self._runs = 0
        self._stop = self._new_stop()
        self._handlers: dict[int, Any] = {}
        self._main_thread, self._own_signal = threading.get_ident(), False
        self._signals, self._signals_write = os.pipe()
        if threading.current_thread() is threading.main_thread():
            os.set_blocking(self._signals_write, False)
            self._old_fd = signal.set_wakeup_fd(self._signals_write)
            self._handlers = {s: signal.signal(s, self._interrupt) for s in _SIGNALS}
        threading.Thread(target=self._watch_signals, daemon=True).start()

    def connected(self, client: Any, index: int, count: int) -> None:
        """Starts to watch the other processes.

        Args:
          client: of JAX's coordination service.
          index: of this process.
          count: of all processes.
        """
        self._failure, self._fail_at = None, math.inf
        self._store, self.index, self.count = Store(client), index, count
        self.doing, self._stop = "starting", self._new_stop()
        threading.Thread(target=self._poll, daemon=True).start()
        atexit.register(self._wait_at_end)  # before JAX's own, as that is older

    def close(self) -> None:
        """Stops watching; signals do what they did before."""
        if self._handlers:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(self._old_fd)
        self._closed = True

    def collect(
        self,
        name: str,
        value: str,
        senders: Sequence[int] | None = None,
        limit_secs: float = WAIT_SECS,
    ) -> list[str]:
        """Returns the values of the processes `senders`, in this order.

        All processes call it, in the same order.

        Args:
          name: what it waits for, such as "to open the data", for messages.
          value: of this process, if it is one of them.
          senders: whose values are wanted; None for all processes.
          limit_secs: how long to wait for processes that are alive.

        Raises:
          ProcessError: another process failed, or the time is over.
        """
        senders = range(self.count) if senders is None else senders
        self._exchanges += 1
        folder, start = f"exchange/{self._exchanges}/", time.monotonic()
        if self.index in senders:
            self._store.write(f"{folder}{self.index}", value)
        doing, pause = self.doing, 0.01
        while True:
            found = self._store.read(folder)
            missing = [i for i in senders if i not in found]
            if not missing:
                self.doing = doing
                return [found[i] for i in senders]
            self.doing = f"waiting for {process_names(missing)} {name}"
            if self._failure:
                raise self._failure
            if time.monotonic() - start > limit_secs:
                raise ProcessError(f"Gave up after {limit_secs:.0f} s of {self.doing}.")
            time.sleep(pause)
            pause = min(2 * pause, 0.5)

    @contextlib.contextmanager
    def stop_requests(self, deadline: float) -> Iterator[Callable[[int], str]]:
        """Makes the first signal a request to stop this run; see `Stop`.

        Args:
          deadline: of the run, by this process's time.monotonic(): a request too, after
            the first step here.

        Yields:
          A function that returns why all processes stop, or "", from the number of
          steps done. Call it in each process with every step, and equally often. Before
          the first call a signal ends the process at once, since there is nothing to
          save.
        """
        self._runs += 1
        stop = self._stop = self._new_stop()
        limit = Deadline(deadline)

        def requested(step: int) -> str:
            self.doing = f"in step {step + 1}"
            if limit.is_over(step):
                stop.ask(TIME_LIMIT)
            return stop.requested(step)

        try:
            yield requested
        finally:
            stop.is_over = True

    def _new_stop(self) -> Stop:
        return Stop(self._runs, self.index, self.count, self._store)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """Tells the other processes of an error that ends its block.

        A run that stopped is no error: the others may still close their files.
        """
        try:
            yield
            self._status = exit_status(None)
        except BaseException as error:
            self._status = exit_status(error)
            if isinstance(error, RunStopped):
                raise
            self._leave(error)
            # Where a process is gone, CPU devices raise a ValueError of Gloo's text.
            if not (isinstance(error, JaxRuntimeError) or "Gloo" in str(error)):
                raise
            reason = str(error).splitlines()[0]
            raise ProcessError(
                f"JAX failed {self.doing}: {reason}\nIf another process has ended, "
                f"see its message. {_RESTART}"
            ) from error

    def end(self, error: BaseException) -> None:
        """Ends this process with an error that another thread than the main one found.

        The other processes are told, as they may wait for what failed here.
        """
        self._tell(error)
        # They end before: process 0 serves the store, and JAX aborts without it.
        self._end(error, time.monotonic() + SHUTDOWN_SECS)

    def _wait_at_end(self) -> None:
        """Waits for all processes, as JAX ends them soon after one has gone."""
        if self._left:
            return
        error = self._last_words or getattr(sys, "last_value", None)  # not caught
        if error is None or isinstance(error, RunStopped):
            try:
                self.collect("to end the program", "")
                self._left = True
                return
            except (ProcessError, JaxRuntimeError, KeyboardInterrupt) as failed:
                logger.warning("%s: %s", type(failed).__name__, failed)
                error = failed
        self._leave(error)

    def _leave(self, error: BaseException) -> None:
        """Tells the others of an error, and lets JAX wait for them for a while."""
        self._left = True
        self._end_at = min(self._leave_at, time.monotonic() + SHUTDOWN_SECS)
        self._last_words = None  # the caller has it
        self._tell(error)

    def _tell(self, error: BaseException) -> None:
        text = f"{type(error).__name__}: {error}"
        with contextlib.suppress(JaxRuntimeError):  # process 0 may have gone
            self._store.write(f"ended/{self.index}", text[:2000])

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: raises what ends this process, if a thread says so."""
        del number, frame
        error, self._error = self._error, None
        if error is not None and not self._left:
            raise error

    def _end(self, error: BaseException, end_at: float) -> None:
        """Raises `error` in the main thread, and ends the process if it is stuck."""
        if self._end_at == math.inf:
            self._error, self._last_words, self._end_at = error, error, end_at
            self._status = exit_status(error)
            if self._handlers:  # a true signal, as it also ends a system call
                self._own_signal = True
                signal.pthread_kill(self._main_thread, signal.SIGTERM)

    def _exit(self) -> None:
        """Ends this process, whatever the main thread does. Nothing else may wait."""
        error = self._last_words
        if error is not None:
            sys.stdout.flush()
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        if error is not None and self._store is not None and not self._left:

            def tell() -> None:
                self._tell(error)
                jax.distributed.shutdown()

            telling = threading.Thread(target=tell, daemon=True)
            telling.start()
            telling.join(0.8)  # process 0 may not answer
        os._exit(self._status)

    def _watch_signals(self) -> None:
        """Ends waits: on signals, when time is over, when another process failed."""
        tick = 0.2
        while not self._closed:
            readable, _, _ = select.select([self._signals], [], [], tick)
            for number in os.read(self._signals, 64) if readable else b"":
                if number in _SIGNALS:
                    self._on_signal(signal.Signals(number).name)
            now = time.monotonic()
            if now > self._end_at:
                self._exit()
            elif self._failure and now > self._fail_at:
                self._end(self._failure, now + LEAVE_SECS)
            elif self._stop.is_late():
                # What ends a process that was asked to stop is no failure of its own.
                kind = KeyboardInterrupt if self._stop.signal else ProcessError
                self._end(
                    kind(
                        f"This run was asked to stop while {self.doing}, and "
                        f"{process_names(self._stop.unanswered)} did not answer. "
                        f"Nothing was saved. {_RESTART}"
                    ),
                    now + 1,
                )
            # Ticks are counted, for this process may have been suspended.
            self._silence += 0 if readable or not self._store else tick
            if self._silence > LOST_SECS:
                self._lost([0])
        os.close(self._signals)
        os.close(self._signals_write)

    def _on_signal(self, name: str) -> None:
        now = time.monotonic()
        if self._own_signal:
            self._own_signal = False
        elif self._left:
            self._end_at = now
        elif self._end_at < math.inf:
            pass  # it ends already
        elif self._stop.request(name):
            logger.info(
                "%s: all processes stop after their step. Once more to stop this one "
                "at once, without saving.",
                name,
            )
        else:
            self._leave_at = now + LEAVE_SECS
            lost = self._stop.describe_loss()
            error = KeyboardInterrupt(f"{name} while {self.doing}. {lost}")
            self._end(error, now + ANSWER_SECS)

    def _poll(self) -> None:
        """Shows that this process is alive, and looks for news of the others.

        Process 0 watches all; the others watch process 0, which keeps what they read.
        """
        pause, seen = 0.0, dict[int, str]()
        silence = dict.fromkeys(range(self.count) if self.index == 0 else (), 0.0)
        while not (self._closed or self._left):
            try:
                self._store.write(f"alive/{self.index}", str(time.monotonic()))
                alive = self._store.read("alive/") if silence else {}
                ended = self._store.read("ended/")
                ended.pop(self.index, None)
                self._stop.poll()
            except JaxRuntimeError:  # process 0 does not answer: its silence counts
                time.sleep(POLL_SECS)
                continue
            self._silence = 0.0
            if ended and not self._failure:
                first = min(ended)
                text = f"Process {first} ended with {ended[first]}"
                self._failure = ProcessError(text)
                self._fail_at = time.monotonic() + FAIL_SECS
            for i in silence:
                silence[i] = silence[i] + pause if alive.get(i) == seen.get(i) else 0.0
            seen = alive
            silent = [i for i, secs in silence.items() if secs > LOST_SECS]
            if silent and not ended:
                self._lost(silent)
            pause = POLL_SECS / 10 if self._stop.is_agreeing() else POLL_SECS
            time.sleep(pause)

    def _lost(self, silent: Sequence[int]) -> None:
        error = ProcessError(
            f"Nothing was heard of {process_names(silent)} for {LOST_SECS:.0f} s, "
            f"while {self.doing}. A process was killed or suspended, or its host "
            f"cannot be reached. {_RESTART}"
        )
        self._end(error, time.monotonic() + FAIL_SECS)
