"""Checkpoints of a run with Orbax: written in the background, whole or not at all.

Orbax writes to a temporary folder and renames it, so an interrupted save leaves the
older checkpoints as they were. The position in the data needs no file: it follows from
the state's step.
"""

import logging
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mixer_jax.files import DiskError, writing
from mixer_jax.training.step import TrainState

logger = logging.getLogger(__name__)


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the whole checkpoints of a run, in ascending order."""
    folder = workdir.absolute() / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def read_latest_params(workdir: pathlib.Path) -> dict[str, Any]:
    """Reads the parameters alone out of the newest checkpoint of a run.

    Nothing is written, so the run may still be training.

    Args:
      workdir: of the run.

    Returns:
      The parameters as numpy arrays, whatever devices they were on.

    Raises:
      FileNotFoundError: the run has saved no checkpoint yet.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise FileNotFoundError(
            f"{workdir} holds neither final.npz nor a checkpoint: the run has not "
            "reached its first checkpoint_every steps yet."
        )
    path = workdir.absolute() / "checkpoints" / str(steps[-1]) / "default"
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
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            # Just after a crash a disk may show hosts different lists.
            single_host_load_and_broadcast=True,
        )
        with writing(self.path):
            self._manager = ocp.CheckpointManager(
                self.path.absolute(), options=options, handler_registry=_handlers()
            )

    def latest_step(self) -> int | None:
        """Returns the step of the newest whole checkpoint, None if there is none."""
        step = self._manager.latest_step()
        return None if step is None else int(step)  # an int32 from another process

    def save(
        self, step: int, state: TrainState, numbers: Mapping[str, float] | None = None
    ) -> None:
        """Starts saving; `state` may be donated as soon as this returns.

        Args:
          step: number of updates done.
          state: after them.
          numbers: to keep with the checkpoint, for `latest_numbers`.
        """
        if step == self.latest_step():
            return
        with writing(self.path):
            self._manager.save(
                step,
                args=ocp.args.PyTreeSave(state),
                custom_metadata=dict(numbers or {}),
                force=True,
            )

    def latest_numbers(self) -> dict[str, float]:
        """Returns what was given to the newest save; {} if that is of an older run."""
        step = self.latest_step()
        if step is None:
            return {}
        return dict(self._manager.metadata(step).custom_metadata or {})

    def restore(self, like: TrainState) -> TrainState:
        """Returns the newest state, on the devices and with the shardings of `like`.

        Args:
          like: a state, or the shapes, dtypes and shardings of one.
        """
        step = self.latest_step()
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args)
        state = self._manager.restore(step, args=args)
        logger.info("start    from the checkpoint of step %d", step)
        return state

    def wait(self) -> None:
        """Waits until what was saved is on disk; raises what went wrong there."""
        with writing(self.path):
            self._manager.wait_until_finished()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Waits for the last save and closes; an error inside the block comes first."""
        try:
            self.wait()
        except Exception as save_error:
            if error is None:
                raise
            if isinstance(error, DiskError):  # one message for a full disk
                return
            logger.error(
                "The last checkpoint could not be saved either: %s: %s",
                type(save_error).__name__,
                save_error,
            )
        finally:
            self._manager.close()


def _handlers() -> ocp.handlers.CheckpointHandlerRegistry:
    """Returns Orbax's usual way to write a state, but for small arrays.

    By default each device that holds an array writes a slice of it, which is cut by a
    program of its own. On eight CPU devices the first save of four blocks then takes
    3.8 s; where one device writes each array of less than 1 MB, 0.2 s.
    """
    array_handler = ocp.type_handlers.ArrayHandler(
        min_slice_bytes_for_replica_parallel=2**20
    )
    handler = ocp.PyTreeCheckpointHandler(
        type_handler_registry=ocp.type_handlers.create_type_handler_registry(
            (jax.Array, array_handler)
        )
    )
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for args in (ocp.args.PyTreeSave, ocp.args.PyTreeRestore):
        registry.add("default", args, handler)
    return registry
