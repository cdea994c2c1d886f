"""Several processes that make one run: starting them, and taking turns.

With one process for each host (TPU) or device (GPU under SLURM), jax.distributed
connects them; from then on jax.devices() are the devices of all.
"""

import importlib.util
import ipaddress
import os
import pathlib
import secrets
import time
from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

T = TypeVar("T")

# What a launcher sets for each process that it starts, and from which JAX reads the
# rest: SLURM's srun, and Open MPI's mpirun.
LAUNCHERS = (
    {"SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID",
     "SLURM_LOCALID"},
    {"OMPI_MCA_orte_hnp_uri", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"},
)  # fmt: skip


# How long a process that failed waits for the others before they are ended too.
SHUTDOWN_SECS = 30

# How long a network disk may take to show a new file to another host.
SHARED_FOLDER_SECS = 20


class ProcessError(RuntimeError):
    """The processes of a run cannot be connected, or another one failed."""


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
) -> None:
    """Connects the processes of a run. Call it before any other use of JAX.

    What is None is taken from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and
    JAX_PROCESS_ID. Without any of them, TPU hosts and what srun or mpirun started are
    recognised; anything else is a run of one process, for which nothing is done.

    Args:
      coordinator: host:port of process 0, on which it listens; if the host is this
        machine's loopback, on no other interface.
      num_processes: how many there are.
      process_id: of this one, from 0.

    Raises:
      ProcessError: only some of the three are known, or they contradict each
        other.
    """
    coordinator = coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS")
    if num_processes is None:
        num_processes = _int_from_environment("JAX_NUM_PROCESSES")
    if process_id is None:
        process_id = _int_from_environment("JAX_PROCESS_ID")
    given = [coordinator, num_processes, process_id]
    if all(x is None for x in given):
        if _has_launcher() or _is_tpu_host():
            _initialize_as_launched()
        return
    if coordinator is None or num_processes is None or process_id is None:
        raise ProcessError(
            f"Got coordinator {coordinator}, num_processes {num_processes} and "
            f"process_id {process_id}. Give all three, or none to have TPU hosts, srun "
            "and mpirun recognised."
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
        f"process  {process_id} of {num_processes}, meeting the others at "
        f"{coordinator}",
        flush=True,
    )
    jax.distributed.initialize(
        coordinator,
        num_processes,
        process_id,
        coordinator_bind_address=coordinator if _is_loopback(host) else None,
        # Given all this, what a launcher says about devices is not asked.
        cluster_detection_method="deactivate",
        shutdown_timeout_seconds=SHUTDOWN_SECS,
    )


def check_shared(folder: pathlib.Path) -> None:
    """Raises ProcessError in all processes if one does not see process 0's `folder`.

    A checkpoint of which each process wrote its part into a folder of its own could
    never be read. Call it early: it is the processes' first meeting, to which none may
    come late, as they may to those that follow.
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


def first_process_first(fn: Callable[[], T]) -> T:
    """Returns fn(), called in process 0 and, once that is done, in the others.

    So process 0 alone downloads and prepares what they share; where hosts share no
    disk, each does so for itself.

    Raises:
      ProcessError: another process raised something; there, that is raised.
    """
    if jax.process_count() == 1:
        return fn()
    result, error = None, None
    for turn_of_first in (True, False):
        if turn_of_first == (jax.process_index() == 0):
            try:
                result = fn()
            except Exception as caught:  # raised below, once the others know
                error = caught
        failed = multihost_utils.process_allgather(np.int32(error is not None))
        if error is not None:
            raise error
        if failed.any():
            raise ProcessError(
                f"Process {np.flatnonzero(failed)[0]} failed; its message says why."
            )
    return result  # type: ignore[return-value]


def _int_from_environment(name: str) -> int | None:
    value = os.environ.get(name)
    if value is None:
        return None
    if not value.isdecimal():
        raise ProcessError(f"{name} is {value!r} in the environment, not a number.")
    return int(value)


def _initialize_as_launched() -> None:
    try:
        jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN_SECS)
    except (OSError, RuntimeError, ValueError) as error:
        raise ProcessError(
            f"This looks like one of several hosts, but how to reach the others cannot "
            f"be found out: {error}\nTo run on this one alone: --coordinator "
            "localhost:8476 --num_processes 1 --process_id 0."
        ) from error


def _has_launcher() -> bool:
    return any(names <= os.environ.keys() for names in LAUNCHERS)


def _is_tpu_host() -> bool:
    dev = pathlib.Path("/dev")
    has_chips = any([*dev.glob("accel[0-9]*"), *dev.glob("vfio/[0-9]*")])
    platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
    wanted = not platforms or "tpu" in platforms
    return has_chips and wanted and importlib.util.find_spec("libtpu") is not None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:  # a name
        return host == "localhost"
