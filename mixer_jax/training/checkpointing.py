"""Checkpoints of a run with Orbax: written in the background, whole or not at all.

Orbax writes to a temporary folder and renames it, so an interrupted save leaves the
older checkpoints as they were. Before the rename, the first process reads everything
back and adds a manifest, with which a checkpoint is compared before it is used. The
position in the data needs no file: it follows from the state's step.
"""

import logging
import math
import pathlib
from collections.abc import Mapping
from types import TracebackType
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from mixer_jax.files import DiskError, most_array_bytes, writing
from mixer_jax.json_files import parse_json
from mixer_jax.training.background import quiet_orbax
from mixer_jax.training.manifest import (
    METADATA,
    DamagedError,
    Manifest,
    check_arrays,
    check_files,
    hash_arrays,
    read_manifest,
    reading,
    write_manifest,
)
from mixer_jax.training.processes import current
from mixer_jax.training.step import TrainState

logger = logging.getLogger(__name__)


def saved_steps(workdir: pathlib.Path) -> list[int]:
    """Returns the steps of the checkpoints of a run, in ascending order.

    Those that were not completed do not count. Damaged ones do.
    """
    folder = workdir.absolute() / "checkpoints"
    return sorted(ocp.utils.checkpoint_steps(folder)) if folder.exists() else []


def damaged_checkpoints(workdir: pathlib.Path) -> list[pathlib.Path]:
    """Returns the checkpoints of a run that were found damaged, and set aside."""
    return sorted((workdir / "checkpoints").glob("*.damaged*"))


def read_latest_params(workdir: pathlib.Path) -> tuple[dict[str, Any], int]:
    """Reads the parameters alone out of the newest checkpoint of a run that is whole.

    Nothing is written, so the run may still be training. A warning names each newer
    checkpoint that is damaged.

    Args:
      workdir: of the run.

    Returns:
      The parameters as numpy arrays, whatever devices they were on, and their step.

    Raises:
      FileNotFoundError: the run has saved no checkpoint yet.
      DamagedError: all checkpoints are damaged.
      DiskError: the newest one cannot be read.
    """
    while steps := saved_steps(workdir):
        for step in reversed(steps):
            folder = _folder(workdir, step)
            try:
                manifest, tree = _check(folder), _read(folder, "params")
                if manifest is not None:
                    check_arrays(tree, manifest)
                return tree["params"], step
            except DamagedError as error:
                if steps != saved_steps(workdir):
                    break  # the run goes on, and may just have deleted this one
                logger.warning("The checkpoint %s is damaged: %s", folder, error)
        else:
            raise DamagedError(
                f"All checkpoints in {workdir / 'checkpoints'} are damaged. Put a copy "
                "of one there, or train again."
            )
    raise FileNotFoundError(
        f"{workdir} holds neither final.npz nor a checkpoint: the run has not reached "
        "its first checkpoint_every steps yet."
    )


def _folder(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return workdir.absolute() / "checkpoints" / str(step)


def _check(folder: pathlib.Path) -> Manifest | None:
    """Returns the manifest of a checkpoint with which its files agree.

    None for a checkpoint of an older run, which has no manifest; all of it can be read.

    Raises:
      DamagedError: its files do not agree, or it cannot be read.
      DiskError: it cannot be read now, and may be whole.
    """
    manifest = read_manifest(folder)
    if manifest is None:
        _read(folder)
        _numbers_of_older(folder)
    else:
        check_files(folder, manifest)
    return manifest


def _numbers_of_older(folder: pathlib.Path) -> dict[str, float]:
    """Returns the numbers that a save without a manifest has, or {}.

    Raises:
      DamagedError: they cannot be read.
      DiskError: the same, and they may be whole.
    """
    with reading(folder, METADATA):
        content = parse_json((folder / METADATA).read_bytes())
        return dict(content.get("custom_metadata") or {})


def _read(folder: pathlib.Path, *names: str) -> dict[str, Any]:
    """Reads the trees `names` of a state, or all of it, as numpy arrays.

    Raises:
      DamagedError: they cannot be read.
      DiskError: they cannot be read now, and may be whole.
    """
    quiet_orbax()
    path, handler = folder / "default", ocp.PyTreeCheckpointHandler()
    with reading(folder):
        tree = handler.metadata(path).tree
        item = {name: tree[name] for name in names or tree}
        needed = sum(_num_bytes(x) for x in jax.tree.leaves(item))
        if names and needed > most_array_bytes(_size_of(folder)):
            raise ValueError(f"its arrays would take {needed:,} bytes")
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), item)
        args = ocp.args.PyTreeRestore(item, as_numpy, partial_restore=True)
        return handler.restore(path, args=args)


def _num_bytes(array: Any) -> int:
    """Returns the size of an array of which Orbax has read the shape and the dtype."""
    return math.prod(array.shape) * np.dtype(array.dtype).itemsize


def _size_of(folder: pathlib.Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _use_newest(workdir: pathlib.Path) -> None:
    """Renames the checkpoints that are newer than the newest whole one.

    The first process does; the others wait for it.

    Raises:
      DamagedError: there were checkpoints, and none is whole.
      DiskError: the newest one cannot be read now. Nothing was renamed.
    """
    if jax.process_index() == 0:
        steps = saved_steps(workdir)
        while steps:
            try:
                _check(_folder(workdir, steps[-1]))
                break
            except DamagedError as error:
                _set_aside(workdir, steps.pop(), str(error))
        if not steps and (damaged := damaged_checkpoints(workdir)):
            raise DamagedError(
                f"No checkpoint of the run in {workdir} is whole: see "
                f"{', '.join(x.name for x in damaged)} in {workdir / 'checkpoints'}. "
                "To continue the run, put a copy of one there, in a folder that has "
                "the step as its name. To train from the start, take another --workdir."
            )
    _first_answer("to check the newest checkpoint", senders=[0])


def _set_aside(workdir: pathlib.Path, step: int, fault: str) -> None:
    """Renames a damaged checkpoint, so that it is none for Orbax any more."""
    folder = _folder(workdir, step)
    aside, count = folder.with_name(f"{step}.damaged"), 1
    while aside.exists():
        aside, count = folder.with_name(f"{step}.damaged{count}"), count + 1
    folder.rename(aside)
    logger.warning(
        "The checkpoint %s is damaged: %s. It is now %s, and of no use; the run goes "
        "on from the one before.",
        folder,
        fault,
        aside.name,
    )


def _first_answer(what: str, value: str = "", senders: list[int] | None = None) -> str:
    """Returns what processes tell of it, the first that is not empty."""
    watch = current()
    if watch is None:
        return value
    return next(filter(None, watch.collect(what, value, senders, math.inf)), "")


class Checkpoints:
    """The newest checkpoints of a run, under <workdir>/checkpoints."""

    def __init__(self, workdir: pathlib.Path, keep: int):
        """Opens the folder, or makes it.

        Newer checkpoints than the newest whole one are set aside, with a warning.

        Args:
          workdir: of the run.
          keep: how many checkpoints stay; older ones are deleted.

        Raises:
          DamagedError: there were checkpoints, and none is whole.
          DiskError: the newest one cannot be read now, or the folder not be written.
        """
        _use_newest(workdir)
        self._workdir, self._saving_step = workdir, 0
        self._saving_numbers = dict[str, float]()
        self.path = workdir / "checkpoints"
        quiet_orbax(self.path)
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.LatestN(keep),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
            async_options=ocp.AsyncOptions(
                # In the background thread of the first process, after all have
                # written, and before the rename.
                post_finalization_callback=self._add_manifest
            ),
            # Just after a crash a disk may show hosts different lists.
            single_host_load_and_broadcast=True,
            # No file of a checkpoint is read that is not known to be whole.
            lightweight_initialize=True,
        )
        with writing(self.path):
            self._manager = ocp.CheckpointManager(
                self.path.absolute(), options=options, handler_registry=_handlers()
            )

    def _add_manifest(self) -> None:
        """Adds the manifest to what was just written, if that can be read back."""
        folder = _folder(self._workdir, self._saving_step)
        folder = folder.with_name(folder.name + ocp.utils.TMP_DIR_SUFFIX)
        if self.path.exists() and not folder.exists():
            raise RuntimeError(
                f"Orbax {ocp.__version__} does not write to {folder}, as other "
                "versions do, so that no manifest can be added. Install another one."
            )
        try:
            arrays = hash_arrays(_read(folder))
        except DamagedError as error:
            raise DamagedError(
                f"The checkpoint of step {self._saving_step} was written, and {error}. "
                "The disk may be faulty. The checkpoint before is as it was."
            ) from error
        write_manifest(folder, arrays, self._saving_numbers)

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
            self._manager.wait_until_finished()  # _add_manifest reads what is set here
            self._saving_step, self._saving_numbers = step, dict(numbers or {})
            self._manager.save(
                step,
                args=ocp.args.PyTreeSave(state),
                custom_metadata=self._saving_numbers,  # if the manifest gets lost
                force=True,
            )

    def latest_numbers(self) -> dict[str, float]:
        """Returns what was given to the newest save; {} if that is of an older run."""
        step = self.latest_step()
        if step is None:
            return {}
        folder = _folder(self._workdir, step)
        manifest = read_manifest(folder)
        return manifest.numbers if manifest else _numbers_of_older(folder)

    def restore(self, like: TrainState) -> TrainState:
        """Returns the newest state, on the devices and with the shardings of `like`.

        If its arrays are not those that were saved, the checkpoint is set aside, and
        the one before is restored.

        Args:
          like: a state, or the shapes, dtypes and shardings of one.

        Raises:
          DamagedError: there is none before.
        """
        abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        args = ocp.args.PyTreeRestore(abstract, restore_args)
        while (step := self.latest_step()) is not None:
            state = self._manager.restore(step, args=args)
            fault = _first_answer(
                "to look at what it restored", self._fault(step, state)
            )
            if not fault:
                logger.info("start    from the checkpoint of step %d", step)
                return state
            if jax.process_index() == 0:
                _set_aside(self._workdir, step, fault)
            _use_newest(self._workdir)
            self._manager.reload()
        raise DamagedError(f"There is no checkpoint in {self.path}.")

    def _fault(self, step: int, state: TrainState) -> str:
        """Returns what is wrong with arrays that were read; "" if nothing is."""
        try:
            if (manifest := read_manifest(_folder(self._workdir, step))) is not None:
                check_arrays(state, manifest)
        except DamagedError as error:
            return str(error)
        return ""

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
            with writing(self.path):
                try:
                    self._manager.wait_until_finished()
                finally:
                    self._manager.close()  # may raise the same error again
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
