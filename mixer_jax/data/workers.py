"""A sequence whose elements other processes of this machine compute.

The threads of one Python process share a lock, so beyond some ten cores one process
prepares images no faster. Grain has processes too (`mp_prefetch`, 0.2.18); but they
import jax, and the main program once more; they go on for ever if the main process is
killed; and what they log does not reach its handlers.

Here each thread of a worker is connected to one thread of the main process by a socket.
It gets a position and returns the element. Order and buffers stay with the caller.
"""

import contextlib
import json
import logging
import logging.handlers
import mmap
import os
import pickle
import queue
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypeVar

import cloudpickle
import numpy as np

from mixer_jax.data.dataset import DatasetError, Source

logger = logging.getLogger(__name__)

T = TypeVar("T")

# One process prepares about 5,000 images a second at most (500 x 375 JPEG to 224
# crops). That takes 8 to 10 cores; more threads only help to wait for a slow disk.
CORES_PER_WORKER = 8
MAX_THREADS = 16
MAX_WORKERS = 16

# One process prepares so many images in 4 s. Workers need 1 s to start, and 3 s with
# the paths of ImageNet.
MIN_IMAGES = 20_000

# What a terminal or a queue sends to all processes of a run. What becomes of the
# workers is for the main process to decide. Windows has not all of them.
_SIGNALS = {
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
    if hasattr(signal, name)
}

_PROGRAM = (
    "import json, sys; sys.path, *rest = json.loads(sys.stdin.readline()); "
    f"from {__name__} import serve; serve(*rest)"
)


def num_cores() -> int:
    """Returns how many cores this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usual_workers(source: Source, num_images: int, sharers: int = 1) -> int:
    """Returns how many workers suit this machine; 0 if its threads do.

    That is one for 8 cores, up to 16 workers. It is 0 for fewer than 16 cores, for
    images that are in memory, for fewer than 20,000 images, and on Windows. It is 0
    for a dataset that cannot be pickled, with a warning.

    Args:
      source: the examples.
      num_images: that this process is going to read.
      sharers: the processes that share this machine's cores equally.
    """
    workers = min(num_cores() // sharers // CORES_PER_WORKER, MAX_WORKERS)
    if workers < 2 or num_images < MIN_IMAGES or os.name == "nt":
        return 0
    if isinstance(source[0].image, np.ndarray):
        return 0
    try:
        _pickled(source, cloudpickle.dumps)
    except Exception as error:  # of any kind, as a class may say how it is pickled
        logger.warning(
            "Threads of one process read the images, as the dataset cannot be pickled "
            "for worker processes: %s",
            error,
        )
        return 0
    return workers


class Workers(Generic[T]):
    """A sequence that is computed by processes. Close it.

    At most `num_threads` threads may ask for elements at a time. A program needs no
    `if __name__ == "__main__"`, and a worker imports nothing but what the sequence
    needs. It ends when it is closed, and when this process ends in any way. There are
    no workers on Windows, where a process cannot inherit sockets in this way.

    Attributes:
      num_threads: of all workers.
      processes: the workers.
    """

    def __init__(
        self,
        sequence: Sequence[T],
        count: int,
        retell: Callable[[logging.LogRecord], None],
    ):
        """Starts the workers, and does not wait until they are ready.

        Args:
          sequence: is pickled. Large arrays in it are in memory once for all workers.
          count: of the processes. They share the cores; each has 1 to 16 threads.
          retell: is called with what workers log, from the level WARNING on.

        Raises:
          DatasetError: the sequence cannot be pickled, or this is Windows.
        """
        if os.name == "nt":
            raise DatasetError(
                "Windows has no worker processes. Expected workers to be 0 "
                "(--config.workers=0)."
            )
        try:
            pieces = _pickled(sequence, cloudpickle.dumps)
        except Exception as error:  # of any kind, as a class may say how it is pickled
            raise DatasetError(
                f"The dataset cannot be pickled for worker processes: {error}. Change "
                "its class, or take no workers (--config.workers=0)."
            ) from error
        threads = min(max(num_cores() // count, 1), MAX_THREADS)
        self.num_threads = count * threads
        self.processes: list[subprocess.Popen[bytes]] = []
        self._length = len(sequence)
        self._retell = retell
        self._is_closed = False
        # Each thread here takes one connection; FIFO, so that all workers have work.
        self._free: queue.SimpleQueue[tuple[subprocess.Popen[bytes], socket.socket]] = (
            queue.SimpleQueue()
        )
        try:
            with _unnamed_file() as file:
                for piece in pieces:
                    file.write(piece)
                file.flush()
                sizes = [len(piece) for piece in pieces]
                for _ in range(count):
                    self._start(threads, file.fileno(), sizes)
        except BaseException:
            self.close()
            raise

    def _start(self, threads: int, file: int, sizes: list[int]) -> None:
        pairs = [socket.socketpair() for _ in range(threads)]
        theirs = [their.fileno() for _, their in pairs]
        # A process inherits which signals are blocked, so it never sees these.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-c", _PROGRAM],
                stdin=subprocess.PIPE,
                pass_fds=[file, *theirs],
            )
        except BaseException:
            for our, _ in pairs:
                our.close()
            raise
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            for _, their in pairs:
                their.close()
        self.processes.append(process)
        for our, _ in pairs:
            self._free.put((process, our))
        arguments = json.dumps([[*map(str, sys.path)], file, sizes, theirs]).encode()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # then an element says what happened
            process.stdin.write(arguments + b"\n")
            process.stdin.flush()

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int, /) -> T:
        """Returns an element; raises what computing it raised.

        Raises:
          ChildProcessError: the worker has ended.
        """
        process, connection = self._free.get()
        try:
            _send(connection, index)
            value, failure, told, records = _receive(connection)
        except (EOFError, OSError) as lost:
            raise self._loss(process) from lost
        finally:
            self._free.put((process, connection))
            if self._is_closed:
                self._disconnect()
        for record in records:
            self._retell(record)
        if failure is not None:
            raise pickle.loads(failure) from _InWorkerError(told)
        return value

    def _loss(self, process: subprocess.Popen[bytes]) -> ChildProcessError:
        """Returns the error for a worker that has gone."""
        if self._is_closed:
            return ChildProcessError("The workers are closed.")
        status = process.wait()
        how = f"ended with exit status {status}; see its message"
        if status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
            if status == -signal.SIGKILL:
                how += ": usually memory was short, see dmesg"
        return ChildProcessError(
            f"Worker process {process.pid}, which prepares images, {how}. The same "
            "command continues the run; with fewer workers by --config.workers, 0 for "
            "none."
        )

    def close(self) -> None:
        """Ends the workers at once; calls that wait for an element fail."""
        if self._is_closed:
            return
        self._is_closed = True
        for process in self.processes:
            process.kill()  # it has nothing to save
        for process in self.processes:
            process.wait()
            assert process.stdin is not None
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
        self._disconnect()

    def _disconnect(self) -> None:
        """Closes the connections that no thread has; one that has one calls it too."""
        free = []
        with contextlib.suppress(queue.Empty):
            while True:
                free.append(self._free.get_nowait())
        for process, connection in free:
            connection.close()
            self._free.put((process, connection))  # for threads that come late


class _InWorkerError(RuntimeError):
    """Shows the traceback of an error in a worker."""

    def __str__(self) -> str:
        return f"in a worker process\n{self.args[0]}"


def log_again(record: logging.LogRecord) -> None:
    """Logs here what another process has logged."""
    logger = logging.getLogger(record.name)
    if logger.isEnabledFor(record.levelno):
        logger.handle(record)


def serve(file: int, sizes: Sequence[int], connections: Iterable[int]) -> None:
    """Is a worker: computes elements until the main process closes its standard input.

    Args:
      file: descriptor of the pickled sequence.
      sizes: of the pickle and its buffers there.
      connections: descriptors of sockets, for one thread each.
    """
    records: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    logging.getLogger().addHandler(logging.handlers.QueueHandler(records))
    try:
        get = _load(file, sizes).__getitem__
    except Exception as error:
        get = _raiser(error)
    for descriptor in connections:
        connection = socket.socket(fileno=descriptor)
        args = connection, get, records
        threading.Thread(target=_answer, args=args, daemon=True).start()
    sys.stdin.read()
    os._exit(0)  # whatever the threads do


def _load(file: int, sizes: Sequence[int]) -> Any:
    # Grain uses jax if it is there, for what it can do itself. Without it a worker
    # starts in half the time, with half the memory.
    logging.disable()
    sys.modules["jax"] = None  # type: ignore[assignment]
    import grain  # noqa: F401

    del sys.modules["jax"]
    logging.disable(logging.NOTSET)
    shared = memoryview(mmap.mmap(file, sum(sizes), access=mmap.ACCESS_COPY))
    pieces, start = [], 0
    for size in sizes:
        pieces.append(shared[start : start + size])
        start += size
    return pickle.loads(pieces[0], buffers=pieces[1:])


def _raiser(error: Exception) -> Callable[[int], Any]:
    def get(index: int) -> Any:
        del index
        raise error

    return get


def _answer(
    connection: socket.socket,
    get: Callable[[int], Any],
    records: "queue.SimpleQueue[logging.LogRecord]",
) -> None:
    """Answers one thread of the main process, until that is gone."""
    try:
        while True:
            index = _receive(connection)
            value, failure, told = None, None, ""
            try:
                value = get(index)
            except Exception as error:
                failure, told = _portable(error), traceback.format_exc()
            new = []
            with contextlib.suppress(queue.Empty):
                while True:
                    new.append(records.get_nowait())
            _send(connection, (value, failure, told, new))
    except (EOFError, OSError):
        os._exit(0)  # the main process is gone
    except BaseException:  # this thread would end, and the other one wait for ever
        traceback.print_exc()
        os._exit(1)


def _portable(error: Exception) -> bytes:
    """Returns the pickle of an error, or of another type if it cannot be pickled."""
    try:
        data = cloudpickle.dumps(error)
        pickle.loads(data)
        return data
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))


def _unnamed_file() -> Any:
    """Opens a file that is gone when no process has it open."""
    if hasattr(os, "memfd_create"):  # Linux: in memory
        return open(os.memfd_create("mixer_jax"), "w+b")
    return tempfile.TemporaryFile()


def _pickled(value: Any, dumps: Callable[..., bytes]) -> list[Any]:
    """Returns a pickle, and the contents of the arrays in it."""
    buffers: list[pickle.PickleBuffer] = []
    data = dumps(value, protocol=5, buffer_callback=buffers.append)
    return [data, *(buffer.raw() for buffer in buffers)]


def _send(connection: socket.socket, value: Any) -> None:
    pieces = _pickled(value, pickle.dumps)
    sizes = [len(piece) for piece in pieces]
    connection.sendall(struct.pack(f"<{1 + len(sizes)}q", len(sizes), *sizes))
    for piece in pieces:
        connection.sendall(piece)


def _receive(connection: socket.socket) -> Any:
    (count,) = struct.unpack("<q", _exactly(connection, 8))
    sizes = struct.unpack(f"<{count}q", _exactly(connection, 8 * count))
    data, *buffers = [_exactly(connection, size) for size in sizes]
    return pickle.loads(data, buffers=buffers)


def _exactly(connection: socket.socket, size: int) -> memoryview:
    """Returns the next `size` bytes; raises EOFError if the other end is gone."""
    buffer = np.empty(size, np.uint8).data
    done = 0
    while done < size:
        count = connection.recv_into(buffer[done:], 0, socket.MSG_WAITALL)
        if not count:
            raise EOFError
        done += count
    return buffer
