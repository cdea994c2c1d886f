"""Checkpoints of a run with Orbax: written in the background, whole or not at all.

Orbax writes to a temporary folder and renames it, so an interrupted save leaves the
older checkpoints as they were. The position in the data needs no file of its own: it
is the state's step.
"""

import pathlib
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mixer_jax.training.step import TrainState

# Where devices hold the same array each writes a slice of it, cut by a program of its
# own. Of small arrays one device writes all: on eight CPU devices the first save then
# takes 0.3 s instead of 12 s (four blocks).
_verbosity = absl_logging.get_verbosity()
absl_logging.set_verbosity(absl_logging.ERROR)  # Orbax warns of what is meant
_default = ocp.type_handlers.get_type_handler(jax.Array)
ocp.type_handlers.register_type_handler(
    jax.Array,
    ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=2**20,
        # With it process 0 checks that all wrote arrays of the same names and shapes
        # before the checkpoint counts.
        array_metadata_store=getattr(_default, "_array_metadata_store", None),
    ),
    override=True,
)
absl_logging.set_verbosity(_verbosity)


def read_latest_params(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the parameters alone out of the newest checkpoint of a run.

    Nothing is written, so the run may be going on meanwhile.

    Args:
      workdir: of the run.

    Returns:
      The parameters as numpy arrays, whatever devices they were on.

    Raises:
      FileNotFoundError: the run has saved no checkpoint yet.
    """
    folder = (workdir / "checkpoints").absolute()
    steps = ocp.utils.checkpoint_steps(folder) if folder.exists() else []
    if not steps:
        raise FileNotFoundError(
            f"{workdir} holds neither final.npz nor a checkpoint: the run has not come "
            "to its first checkpoint_every steps yet."
        )
    path = folder / str(max(steps)) / "default"
    handler = ocp.PyTreeCheckpointHandler()
    item = {"params": handler.metadata(path).tree["params"]}
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), item)
    args = ocp.args.PyTreeRestore(item, as_numpy, partial_restore=True)
    return handler.restore(path, args=args)["params"]


class Checkpoints:
    """The newest checkpoints of a run, under <workdir>/checkpoints."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        """Opens the folder, or makes it.

        Args:
          workdir: of the run.
          keep: how many checkpoints stay; older ones are deleted.
        """
        self.path = workdir / "checkpoints"
        self._manager = ocp.CheckpointManager(
            self.path.absolute(),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=preservation_policy.LatestN(keep),
                cleanup_tmp_directories=True,
                enable_async_checkpointing=True,
                # A disk may show hosts different lists just after a crash.
                single_host_load_and_broadcast=True,
            ),
        )

    def latest_step(self) -> int | None:
        """Returns the step of the newest whole checkpoint, None if there is none."""
        step = self._manager.latest_step()
        return None if step is None else int(step)  # an int32 from another process

    def save(self, step: int, state: TrainState) -> None:
        """Starts saving; `state` may be donated as soon as this returns."""
        if step != self.latest_step():
            self._manager.save(step, args=ocp.args.StandardSave(state), force=True)

    def restore(self, like: TrainState) -> TrainState:
        """Returns the newest state, on the devices and with the shardings of `like`.

        Args:
          like: a state, or the shapes, dtypes and shardings of one.
        """
        step = self.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        return self._manager.restore(step, args=ocp.args.StandardRestore(abstract))

    def reached_preemption(self, step: int) -> bool:
        """Tells whether the platform announced that this job will be stopped."""
        return self._manager.reached_preemption(step)

    def wait(self) -> None:
        """Waits until what was saved is on disk; raises what went wrong there."""
        self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._manager.wait_until_finished()
        self._manager.close()
