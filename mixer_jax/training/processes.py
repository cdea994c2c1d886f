"""The processes of a run: connected at the start, in turn, and asked to stop.

With one process for each host (TPU) or device (GPU under SLURM), jax.distributed
connects them; from then on jax.devices() are the devices of all.
"""

import contextlib
import functools
import ipaddress
import logging
import math
import os
import pathlib
import secrets
import signal
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax

# JAX has no public name for its key-value store, which Orbax takes from here too. Only
# through it can processes talk that have other devices or programs.
from jax._src.distributed import global_state

from mixer_jax.training.stopping import (
    TIME_LIMIT,
    Deadline,
    ProcessError,
    RunStopped,
    exit_status,
)
from mixer_jax.training.watch import Watch

__all__ = ["ProcessError", "RunStopped", "exit_status"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long the processes of a run may take to start.
CONNECT_SECS = 300.0

# JAX aborts, with many lines, where the processes do not end together in this time.
# The watch ends them before.
JAX_SHUTDOWN_SECS = 30

# How long a network disk may take to show a new file to another host.
SHARED_FOLDER_SECS = 20

_watch: Watch | None = None  # of a run of several processes


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> contextlib.AbstractContextManager[Any]:
    """Connects the processes of a run. Call it before any other use of JAX.

    From here on SIGTERM and Ctrl-C end a process that waits for another one.

    What is None is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Without any of them JAX looks for a cluster: TPU hosts, Kubernetes
    jobs, and what srun or mpirun started. Where it finds none, this is a run of one
    process.

    Args:
      coordinator: host:port of process 0, on which it listens; if the host is this
        machine's loopback, on no other interface.
      num_processes: how many there are.
      process_id: of this one, from 0.

    Returns:
      A context. If its block ends with an error, the other processes are told. At the
      end of the program each process waits for the others, for 300 s at most.

    Raises:
      ProcessError: only some of the three are known, they contradict each other, or
        the others cannot be reached.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None:
        num_processes = _int_from_environment("JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _int_from_environment("JAX_PROCESS_ID")
    given = [coordinator, num_processes, process_id]
    if all(x is None for x in given):
        return _connect(_initialize_in_cluster, "the processes of this cluster")
    if coordinator is None or num_processes is None or process_id is None:
        raise ProcessError(
            f"Got coordinator {coordinator}, num_processes {num_processes} and "
            f"process_id {process_id}. Give all three; or none, and JAX recognises TPU "
            "hosts, srun and mpirun."
        )
    if not 0 <= process_id < num_processes:
        raise ProcessError(
            f"process_id is {process_id}; with {num_processes} processes it is from 0 "
            f"to {num_processes - 1}."
        )
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise ProcessError(
            f"coordinator is {coordinator!r}; expected host:port of process 0, such as "
            "10.0.0.2:8476, or localhost:8476."
        )
    print(
        f"process  {process_id} of {num_processes}, connecting to the others at "
        f"{coordinator}",
        flush=True,
    )
    connect = functools.partial(
        _initialize,
        coordinator_address=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        coordinator_bind_address=coordinator if _is_loopback(host) else None,
        # The flags are enough; a launcher's choice of devices is not asked for.
        cluster_detection_method="deactivate",
    )
    return _connect(connect, f"the {num_processes} processes at {coordinator}")


def _connect(
    connect: Callable[[], None], where: str
) -> contextlib.AbstractContextManager[Any]:
    """Connects the processes under watch."""
    global _watch
    error = ProcessError(
        f"Gave up connecting {where} after {CONNECT_SECS:.0f} s. Start all of them, "
        "with the same coordinator and number of processes; they must reach its port."
    )
    watch = Watch(f"connecting {where}", CONNECT_SECS, error)
    try:
        connect()
    except BaseException:
        watch.close()
        raise
    if global_state.client is None or global_state.num_processes == 1:
        watch.close()
        return contextlib.nullcontext()
    _watch = watch
    watch.connected(
        global_state.client, global_state.process_id, global_state.num_processes
    )
    return watch.telling()


def _initialize(**kwargs: Any) -> None:
    # JAX's handler of SIGTERM hears nothing while a process waits; ours does.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        **kwargs,
        # It aborts the process, with many lines; the watch is first.
        initialization_timeout=int(CONNECT_SECS) + 60,
        shutdown_timeout_seconds=JAX_SHUTDOWN_SECS,
    )


def current() -> Watch | None:
    """Returns this process among those of a run, or None if it is the only one.

    Raises:
      ProcessError: there are several, and something else than `initialize` connected
        them.
    """
    if _watch is None and global_state.num_processes > 1:
        raise ProcessError(
            "There are several processes. Connect them with "
            "mixer_jax.training.processes.initialize, before any other use of JAX."
        )
    return _watch


def check_shared(folder: pathlib.Path) -> None:
    """Raises ProcessError in all processes if one does not see process 0's `folder`.

    Each process writes its part of a checkpoint, and in separate folders those parts
    are useless.
    """
    watch = current()
    if watch is None:
        return
    name = f".{secrets.token_hex(8)}.shared"
    try:
        if watch.index == 0:
            (folder / name).touch()
        (name,) = watch.collect("to write into the work directory", name, senders=[0])
        mark = folder / name
        deadline = time.monotonic() + SHARED_FOLDER_SECS
        while not mark.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = watch.collect("to look at the work directory", str(mark.exists()))
    finally:
        if watch.index == 0:
            (folder / name).unlink(missing_ok=True)
    if "False" in seen:
        raise ProcessError(
            f"{folder} is not the same folder for all processes: what process 0 writes "
            f"there, process {seen.index('False')} does not see. Take a --workdir on a "
            "disk that all share."
        )


def first_process_first(fn: Callable[..., T], *args: Any) -> T:
    """Returns fn(*args), called in process 0 first, and then in the others.

    So only process 0 downloads and prepares what they share. Hosts that share no disk
    each do it for themselves. It may take hours; the others wait as long as process 0
    is alive.

    Raises:
      ProcessError: another process raised something; there, that is raised.
    """
    watch = current()
    if watch is None:
        return fn(*args)
    name = f"to finish {fn.__name__}"
    if watch.index == 0:
        result = fn(*args)
    watch.collect(name, "", senders=[0], limit_secs=math.inf)
    if watch.index != 0:
        result = fn(*args)
    watch.collect(name, "", limit_secs=math.inf)
    return result


def count_on_host() -> int:
    """Returns how many processes of this run are on this machine.

    All processes call it; the first time, they ask each other.
    """
    watch = current()
    return 1 if watch is None else _count_on_host(watch)


@functools.cache
def _count_on_host(watch: Watch) -> int:
    hosts = watch.collect("to name their hosts", socket.gethostname())
    return hosts.count(hosts[watch.index])


def _int_from_environment(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise ProcessError(f"{name} is {value!r} in the environment, not a number.")
    return int(value)


def _initialize_in_cluster() -> None:
    """Connects the processes of a cluster that JAX recognises, if there is one."""
    if jax.config.jax_platforms == "cpu":  # type: ignore[attr-defined]
        # A program on the CPU of a TPU host is alone: JAX sets this on hosts without
        # TPUs, and then does not ask for the other hosts.
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    try:
        with warnings.catch_warnings():
            # In a Kubernetes pod JAX advises to install the package kubernetes.
            warnings.simplefilter("ignore")
            _initialize()
    except ValueError as error:  # JAX has no other word for "no cluster found"
        if "coordinator_address should be defined" not in str(error):
            logger.warning("This is a run of one process. JAX says: %s", error)
    except Exception as error:  # of any kind: it asks several services
        raise ProcessError(
            f"This looks like one of several hosts, but the others cannot be reached: "
            f"{error}\nTo run on this one alone: --coordinator localhost:8476 "
            "--num_processes 1 --process_id 0."
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        return host == "localhost"


@contextlib.contextmanager
def stop_requests(deadline: float = math.inf) -> Iterator[Callable[[int], str]]:
    """Makes SIGTERM, Ctrl-C and a deadline requests to stop; a second signal acts.

    Before the first call of what it yields a signal raises KeyboardInterrupt at once,
    since there is nothing to save. A second signal does what a signal did before: it
    ends train.py, also while that waits for the end of a save. Several processes stop
    at the same call; see `Watch.stop_requests`. Python can set a handler in the main
    thread only: in another one signals do what they did before.

    Args:
      deadline: of the run, by time.monotonic(). It counts after the first step here, so
        that each start brings the run forward.

    Yields:
      A function that returns why the run is to stop, such as "SIGTERM", or "". It takes
      the number of steps done.
    """
    watch = current()
    if watch is not None:
        with watch.stop_requests(deadline) as stop_requested:
            yield stop_requested
        return
    signalled, limit = "", Deadline(deadline)

    def request(number: int, frame: Any) -> None:
        del frame
        nonlocal signalled
        name = signal.Signals(number).name
        if limit.first_step < 0:
            raise KeyboardInterrupt(f"{name} before the first step. Nothing is lost.")
        signalled = name
        restore()
        logger.info(
            "%s: stopping after this step. Once more to stop at once, without saving.",
            name,
        )

    def restore() -> None:
        for old_number, handler in old.items():
            signal.signal(old_number, handler)

    def requested(step: int) -> str:
        is_over = limit.is_over(step)
        return signalled or (TIME_LIMIT if is_over else "")

    if threading.current_thread() is not threading.main_thread():
        yield requested
        return
    old = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requested
    finally:
        restore()
