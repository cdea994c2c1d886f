"""The lock of a work directory: only one run at a time writes there.

On one machine the operating system keeps the lock, and frees it when the process ends,
in whatever way. Another machine may see the folder on a shared disk. There such a lock
may have no effect, or outlive the machine that took it. So the file also says who holds
it, and that process renews the file's time again and again. Clocks are not compared:
whoever finds the lock of another machine looks whether that time changes.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import pathlib
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from mixer_jax.data.names import printable
from mixer_jax.files import writing
from mixer_jax.training.processes import current

logger = logging.getLogger(__name__)

NAME = "run.lock"

# Seconds after which a run renews its lock.
RENEW_SECS = 10.0

# A lock of another machine that is not renewed for so long is of a dead run.
DEAD_SECS = 60.0

# How long a process may take from making the file to writing into it.
_WRITE_SECS = 5.0

# How long the lock that replaces a dead run's must stay, before it counts.
_REPLACE_SECS = 2.0

_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.ENOLCK}

_held: set[int] = set()  # the open files of this process's locks


class WorkdirInUseError(RuntimeError):
    """Another run writes into the work directory."""


class _Holder(NamedTuple):
    """Who holds a lock, as its file says."""

    machine: str
    host: str
    pid: int
    since: str
    token: str

    def __str__(self) -> str:
        return printable(f"process {self.pid} on {self.host}, since {self.since}")


@contextlib.contextmanager
def locked(workdir: pathlib.Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of a folder, which is made if there is none.

    Of several processes of a run the first one holds it for all.

    Yields:
      A function that raises WorkdirInUseError if another run has taken the lock, as it
      does when this process was suspended for a while. Call it before a save.

    Raises:
      WorkdirInUseError: another run holds it. Nothing in the folder was changed.
      DiskError: the folder cannot be written to.
    """
    watch = current()
    if watch is not None and watch.index != 0:
        yield lambda: None
        return
    path = workdir / NAME
    with writing(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        file = _acquire(path)
    _held.add(file)
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(RENEW_SECS):
            with contextlib.suppress(OSError):  # a disk may be away for a while
                os.utime(file)

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield lambda: _check_held(file, path)
    finally:
        ended.set()
        thread.join()
        if file in _held:  # else this is a child
            _held.remove(file)
            with contextlib.suppress(OSError):  # the folder may be gone
                if _is_at(file, path):
                    path.unlink()
            os.close(file)


def _close_in_child() -> None:
    """A child that lives longer than the run may not keep its lock."""
    while _held:
        os.close(_held.pop())


os.register_at_fork(after_in_child=_close_in_child)


def _acquire(path: pathlib.Path) -> int:
    """Returns the open file of the lock, as soon as this process holds it."""
    own = _Holder(
        _machine(),
        socket.gethostname(),
        os.getpid(),
        time.strftime("%Y-%m-%d %H:%M:%S %Z"),
        secrets.token_hex(8),
    )
    replaces = False
    while True:
        try:
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
            is_new = True
        except FileExistsError:
            try:
                file, is_new = os.open(path, os.O_RDWR | os.O_NOFOLLOW), False
            except FileNotFoundError:  # its run has just ended
                continue
        is_ours = False
        try:
            has_lock = _lock(file)
            found = None if is_new and has_lock is not False else _read(file)
            if found and (found.machine != own.machine or has_lock is None):
                if _is_dead(path, found):
                    # The operating system's lock on this file may never be freed.
                    path.unlink(missing_ok=True)
                    replaces = True
            elif has_lock is False:
                raise _in_use(path, found)
            else:
                os.truncate(file, 0)
                os.pwrite(file, json.dumps(own._asdict()).encode() + b"\n", 0)
                if replaces:  # another machine may have done so at the same moment
                    time.sleep(_REPLACE_SECS)
                is_ours = _is_at(file, path)
        except OSError:
            if is_new:
                path.unlink(missing_ok=True)
            raise
        finally:
            if not is_ours:
                os.close(file)
        if is_ours:
            return file


def _lock(file: int) -> bool | None:
    """Takes the operating system's lock if it is free.

    Returns:
      Whether this process has it; None if this disk has no such locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            return None
        raise


def _read(file: int) -> _Holder | None:
    """Returns what a lock says; None if that is nothing, even after a while."""
    deadline = time.monotonic() + _WRITE_SECS
    while not (holder := _parse(os.pread(file, 4096, 0))):
        if time.monotonic() > deadline:
            return None
        time.sleep(0.1)
    return holder


def _parse(content: bytes) -> _Holder | None:
    try:
        values = json.loads(content)
        holder = _Holder(**values)
    except (ValueError, TypeError, RecursionError):  # cut off by a crash, or damaged
        return None
    return holder if all(isinstance(x, str | int) for x in holder) else None


def _is_dead(path: pathlib.Path, holder: _Holder) -> bool:
    """Returns whether a lock is renewed no more; False if it is gone or another's.

    Raises:
      WorkdirInUseError: it is renewed.
    """
    logger.warning(
        "%s is locked by %s. Waiting for up to %.0f s to see if it is alive.",
        path.parent,
        holder,
        DEAD_SECS,
    )
    deadline, seen = time.monotonic() + DEAD_SECS, None
    while time.monotonic() < deadline:
        try:
            # A network disk tells what is new when a file is opened.
            with path.open("rb") as file:
                now, content = os.fstat(file.fileno()).st_mtime_ns, file.read(4096)
        except FileNotFoundError:
            return False
        if _parse(content) != holder:
            return False
        if seen not in (None, now):
            raise _in_use(path, holder)
        seen = now
        time.sleep(min(1.0, DEAD_SECS / 10))
    return True


def _is_at(file: int, path: pathlib.Path) -> bool:
    """Returns whether an open file is the one at `path`, and not one that was there."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _check_held(file: int, path: pathlib.Path) -> None:
    """Raises WorkdirInUseError if another run has put its lock at `path`."""
    with contextlib.suppress(FileNotFoundError):  # no other run has
        if not os.path.samestat(os.fstat(file), path.stat()):
            other = path.read_bytes()[:4096]
            raise WorkdirInUseError(
                f"{path.parent} is now in use by {_parse(other) or 'another process'}. "
                "It has taken over while this one was suspended, or could not reach "
                "the disk. This one ends, and saves nothing more there."
            )


def _machine() -> str:
    """Names what the operating system's locks reach: a machine from boot to boot.

    Containers have names of their own, and may share it.
    """
    try:
        return pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def _in_use(path: pathlib.Path, holder: _Holder | None) -> WorkdirInUseError:
    return WorkdirInUseError(
        f"{path.parent} is in use by {holder or 'another process'}. Nothing was "
        "changed there. Wait until that run ends, or stop it; or take another "
        "--workdir."
    )
