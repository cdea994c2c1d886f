"""The processes of a run: connected at the start, in turn, and asked to stop.

With one process for each host (TPU) or device (GPU under SLURM), jax.distributed
connects them; from then on jax.devices() are the devices of all.
"""

import contextlib
import ipaddress
import logging
import os
import pathlib
import secrets
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

logger = logging.getLogger(__name__)

T = TypeVar("T")

# How long a process that failed waits for the others before they are ended too.
SHUTDOWN_SECS = 30

# How long a network disk may take to show a new file to another host.
SHARED_FOLDER_SECS = 20


class ProcessError(RuntimeError):
    """The processes of a run cannot be connected, or another one failed."""


class RunStopped(Exception):  # noqa: N818 - it is no error
    """A signal asked the run to stop. What it had computed is saved."""

    def __init__(self, step: int, total_steps: int, workdir: pathlib.Path):
        text = "Stopped before the first step; nothing is lost."
        if step:
            text = (
                f"Stopped at step {step} of {total_steps}. The same command continues "
                f"from there, in {workdir}."
            )
        super().__init__(text)


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects the processes of a run. Call it before any other use of JAX.

    What is None is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Without any of them JAX looks for a cluster: TPU hosts, Kubernetes
    jobs, and what srun or mpirun started. Where it finds none, this is a run of one
    process.

    Args:
      coordinator: host:port of process 0, on which it listens; if the host is this
        machine's loopback, on no other interface.
      num_processes: how many there are.
      process_id: of this one, from 0.

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
        _initialize_in_cluster()
        return
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
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        coordinator_bind_address=coordinator if _is_loopback(host) else None,
        # The flags are enough; a launcher's choice of devices is not asked for.
        cluster_detection_method="deactivate",
        shutdown_timeout_seconds=SHUTDOWN_SECS,
    )


def check_shared(folder: pathlib.Path) -> None:
    """Raises ProcessError in all processes if one does not see process 0's `folder`.

    Each process writes its part of a checkpoint, and in separate folders those parts
    are useless. Call it early: JAX gives processes less time to arrive at their first
    meeting, which this is, than at later ones.
    """
    if jax.process_count() == 1:
        return
    name = multihost_utils.broadcast_one_to_all(np.int32(secrets.randbits(31)))
    mark = folder / f".{name}.shared"
    if jax.process_index() == 0:
        mark.touch()
    multihost_utils.sync_global_devices("mark made")
    deadline = time.monotonic() + SHARED_FOLDER_SECS
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    seen = multihost_utils.process_allgather(np.int32(mark.exists()))
    if jax.process_index() == 0:
        mark.unlink()
    if not seen.all():
        raise ProcessError(
            f"{folder} is not the same folder for all processes: what process 0 writes "
            f"there, process {np.flatnonzero(seen == 0)[0]} does not see. Take a "
            "--workdir on a disk that all share."
        )


def first_process_first(fn: Callable[..., T], *args: Any) -> T:
    """Returns fn(*args), called in process 0 first, and then in the others.

    So only process 0 downloads and prepares what they share. Hosts that share no disk
    each do it for themselves.

    Raises:
      ProcessError: another process raised something; there, that is raised.
    """
    if jax.process_count() == 1:
        return fn(*args)
    result, error = None, None
    is_first = jax.process_index() == 0
    for my_turn in (is_first, not is_first):
        if my_turn:
            try:
                result = fn(*args)
            except Exception as caught:  # raised below, once the others know
                error = caught
        failed = multihost_utils.process_allgather(np.int32(error is not None))
        if error is not None:
            raise error
        if failed.any():
            raise ProcessError(
                f"Process {np.flatnonzero(failed)[0]} failed; see its message."
            )
    return result  # type: ignore[return-value]


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
            jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_SECS)
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
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Makes SIGTERM and Ctrl-C a request to stop after the step; a second one acts.

    Several processes must stop at the same step, and so learn of it through Orbax
    instead (`Checkpoints.reached_preemption`).

    Yields:
      A function that returns whether the run is asked to stop.
    """
    requested = threading.Event()

    def request(number: int, frame: Any) -> None:
        del frame
        if requested.is_set():
            raise KeyboardInterrupt("Ended at once, without saving.")
        requested.set()
        logger.info(
            "%s: stopping after this step. Once more to stop at once, without saving.",
            signal.Signals(number).name,
        )

    in_main_thread = threading.current_thread() is threading.main_thread()
    if jax.process_count() > 1 or not in_main_thread:
        yield lambda: False
        return
    old = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requested.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
