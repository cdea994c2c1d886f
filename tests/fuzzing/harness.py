"""Reads damaged files, and says of each what went wrong, if anything did."""

import logging
import multiprocessing
import os
import pathlib
import resource
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any, NamedTuple

from .mutations import mutate

MEGABYTE = 2**20
LONGEST_MESSAGE = 120_000  # characters: a line for each parameter of a deep model


class Reader(NamedTuple):
    """Something that reads files which may come from strangers.

    Attributes:
      write: writes small sound files into a folder; returns those to damage, one at a
        time. The others stay sound.
      read: reads, given the path of the damaged file.
      accepted: the errors that it may raise for that.
      names_file: whether their messages name the file or its folder.
    """

    write: Callable[[pathlib.Path], list[pathlib.Path]]
    read: Callable[[pathlib.Path], object]
    accepted: tuple[type[Exception], ...]
    names_file: bool = True


class Finding(NamedTuple):
    """Something wrong: what, in one line; and all that is known."""

    what: str
    details: str


class Input(NamedTuple):
    """A damaged file: where it is, its bytes, and those it had."""

    path: pathlib.Path
    data: bytes
    sound: bytes


class Fuzzer:
    """Makes damaged files of a reader's sound ones, and has them read."""

    def __init__(self, reader: Reader, folder: pathlib.Path):
        self._reader = reader
        self._damaged: Input | None = None
        self._left: list[Finding] = []  # of what is found where nobody can catch it
        self._seeds = [(path, path.read_bytes()) for path in reader.write(folder)]

    def check_sound(self) -> None:
        """Raises what the reader says of a sound file, which should be nothing."""
        for path, _ in self._seeds:
            self._reader.read(path)

    def make(self, rng: Random) -> Input:
        """Chooses a file and damages its bytes, in memory."""
        path, sound = rng.choice(self._seeds)
        return Input(path, mutate(rng, sound, path.suffix), sound)

    def attempt(self, damaged: Input) -> Finding | None:
        """Writes the file and has it read. All others are sound."""
        if self._damaged and self._damaged.path != damaged.path:
            self._damaged.path.write_bytes(self._damaged.sound)
        damaged.path.write_bytes(damaged.data)
        self._damaged = damaged
        self._left.clear()
        sys.unraisablehook = self._note_unraisable
        try:
            self._reader.read(damaged.path)
        except self._reader.accepted as error:
            if finding := self._look_at(error, damaged.path):
                return finding
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the panics of Rust are no Exceptions
            return _finding(type(error).__name__, error)
        finally:
            sys.unraisablehook = sys.__unraisablehook__
        return self._left[0] if self._left else None

    def _note_unraisable(self, found: Any) -> None:
        """Takes what a finalizer raises, such as the warning of a file left open."""
        self._left.append(
            _finding(f"{type(found.exc_value).__name__}", found.exc_value)
        )

    def _look_at(self, error: Exception, path: pathlib.Path) -> Finding | None:
        text, causes = str(error), list(_causes(error))
        if any(isinstance(x, MemoryError) for x in causes):
            return _finding("memory was refused", error)
        if self._reader.names_file and not {path.name, path.parent.name} & _names(text):
            return _finding("the message does not name the file", error)
        if len(text) > LONGEST_MESSAGE:
            return _finding(f"a message of {len(text)} characters", error)
        return None


def _names(text: str) -> set[str]:
    """Returns the words of a message between blanks and slashes, without colons."""
    return {
        part.strip(":,.;'\"()") for word in text.split() for part in word.split("/")
    }


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error:
        yield error
        error = error.__cause__ or error.__context__


def _finding(what: str, error: BaseException) -> Finding:
    frames = traceback.extract_tb(error.__traceback__)
    own = [x for x in frames if "mixer_jax" in x.filename] or frames
    place = f"{pathlib.Path(own[-1].filename).name}:{own[-1].lineno}"
    details = "".join(traceback.format_exception(error))
    if len(details) > 20_000:
        details = f"{details[:10_000]}\n…\n{details[-10_000:]}"
    return Finding(f"{what} at {place} ({type(error).__name__})", details)


class Report(NamedTuple):
    """What a number of inputs gave.

    Attributes:
      findings: the first of its kind, with its number; by what was found.
      counts: how many of each kind.
      inputs: how many there were.
      secs: of the processor, the most that one took.
      megabytes: the most that one took.
    """

    findings: dict[str, tuple[int, str]]
    counts: Counter
    inputs: int
    secs: float
    megabytes: float


def random_of(seed: int, i: int) -> Random:
    return Random(f"{seed}/{i}")


def fuzz(name: str, inputs: int, seed: int, hang_secs: float) -> Report:
    """Has so many damaged files read, in a process that is used again.

    It gets a new one after a hang, and where it dies. Seconds are of the processor, so
    that other programs do not count; by the clock, twenty times as many are a hang. A
    read that needs more memory than ten times the file and 500 MB is refused it.
    """
    context = multiprocessing.get_context("spawn")
    findings: dict[str, tuple[int, str]] = {}
    counts: Counter = Counter()
    secs = megabytes = 0.0
    start = 0
    memory = "/dev/shm"  # where there are no disks to wait for
    where = memory if os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=where) as folder:
        while start < inputs:
            current = context.Value("q", -1)
            here, there = context.Pipe(duplex=False)
            args = (name, folder, start, inputs, seed, hang_secs, current, there)
            worker = context.Process(target=_work, args=args, daemon=True)
            worker.start()
            there.close()
            before, since, used_before, fatal = -1, time.monotonic(), 0.0, None
            while True:
                try:
                    message = here.recv() if here.poll(0.5) else None
                except EOFError:
                    worker.join()
                    fatal = f"the process died with {worker.exitcode}"
                    break
                if message and message[0] == "done":
                    secs, megabytes = max(secs, message[1]), max(megabytes, message[2])
                    break
                if message:
                    i, (what, details) = message
                    counts[what] += 1
                    findings.setdefault(what, (i, details))
                used, now = _cpu_secs(worker.pid), time.monotonic()
                if current.value != before:
                    before, since, used_before = current.value, now, used
                # Starting, with its imports, is no hang of the reader.
                elif before >= 0 and (
                    used - used_before > hang_secs or now - since > 20 * hang_secs
                ):
                    fatal = f"hangs for more than {hang_secs:g} s"
                    break
            worker.kill()
            worker.join()
            if fatal is None:
                break
            if current.value < start:
                raise RuntimeError(f"The process cannot start: {fatal}")
            counts[fatal] += 1
            findings.setdefault(fatal, (current.value, ""))
            start = current.value + 1
    return Report(findings, counts, inputs, secs, megabytes)


def _work(
    name: str,
    folder: str,
    start: int,
    stop: int,
    seed: int,
    hang_secs: float,
    current: Any,
    pipe: Any,
) -> None:
    from . import READERS

    # A worker that died may have left a damaged file: each has its own folder.
    own = pathlib.Path(tempfile.mkdtemp(dir=folder))
    prepare_process()
    fuzzer = Fuzzer(READERS[name], own)
    fuzzer.check_sound()
    longest = most = 0.0
    for i in range(start, stop):
        damaged = fuzzer.make(random_of(seed, i))
        current.value = i
        finding, secs, size = measured(fuzzer, damaged)
        if finding is None and secs > hang_secs:
            finding = Finding(f"took more than {hang_secs:g} s", f"{secs:.1f} s")
        longest, most = max(longest, secs), max(most, size)
        if finding:
            pipe.send((i, finding))
    pipe.send(("done", longest, most))


def prepare_process() -> None:
    """Makes warnings errors, as in tests, and log lines complete, but not shown."""
    warnings.simplefilter("error")

    class Nowhere(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            self.format(record)

    logging.raiseExceptions = True
    logging.getLogger().handlers = [Nowhere()]


def measured(fuzzer: Fuzzer, damaged: Input) -> tuple[Finding | None, float, float]:
    """Attempts an input; returns seconds and megabytes as well."""
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # of the peak
    before = _kilobytes("VmRSS")
    bound = 10 * len(damaged.data) + 500 * MEGABYTE
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_kilobytes("VmSize") * 1024 + bound, most))
    start = time.process_time()
    try:
        finding = fuzzer.attempt(damaged)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    secs = time.process_time() - start
    return finding, secs, (_kilobytes("VmHWM") - before) / 1024


def _cpu_secs(pid: int | None) -> float:
    """Returns the time that a process has had of the processors."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:  # it has just ended
        return 0.0
    fields = stat.rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _kilobytes(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split(None, 1)[0])
