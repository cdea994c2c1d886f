import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType

from mixer_jax.run import program
from mixer_jax.training import sharding
from mixer_jax.training.checkpointing import Checkpoints, saved_steps

from ..run.test_trainer import tiny_config


def program_on(data, fsdp):
    devices = jax.devices()[: data * fsdp]
    mesh = jax.make_mesh(
        (data, fsdp), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices
    )
    return program.build_program(tiny_config(), mesh, 10)


@pytest.mark.parametrize(("data", "fsdp"), [(2, 4), (1, 1)])
def test_checkpoint_of_eight_devices_restores_on_others(
    tmp_path, monkeypatch, data, fsdp
):
    monkeypatch.setattr(sharding, "MIN_SPLIT_SIZE", 64)
    saved = program_on(8, 1).init(jax.random.key(3))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(5, saved)
        checkpoints.wait()
        like = program_on(data, fsdp).abstract_state
        found = checkpoints.restore(like)
    jax.tree.map(np.testing.assert_array_equal, found, saved)
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(
        lambda x: x.sharding, like
    )
    split = [x for x in jax.tree.leaves(found) if not x.sharding.is_fully_replicated]
    assert bool(split) == (fsdp > 1)


class ClosingManager(ocp.CheckpointManager):
    closed = 0

    def close(self):
        super().close()
        ClosingManager.closed += 1


@pytest.fixture
def failing(tmp_path, monkeypatch):
    """Checkpoints of which none can be written."""

    def finalize(self, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ClosingManager, "closed", 0)
    monkeypatch.setattr(ClosingManager, "_finalize_checkpoint", finalize)
    monkeypatch.setattr(ocp, "CheckpointManager", ClosingManager)
    return Checkpoints(tmp_path, keep=1)


STATE = {"step": jax.numpy.int32(1), "params": jax.numpy.ones((2, 3))}


def test_a_save_that_failed_is_an_error(failing):
    with pytest.raises(OSError, match="No space left"), failing:
        failing.save(1, STATE)
    assert ClosingManager.closed == 1


def test_a_save_that_failed_does_not_hide_the_error_of_the_run(failing, caplog):
    def run():
        with failing:
            failing.save(1, STATE)
            raise ArithmeticError("the loss is nan")

    with pytest.raises(ArithmeticError, match="the loss is nan"):
        run()
    assert ClosingManager.closed == 1
    assert "could not be saved either: DiskError: " in caplog.text


def test_only_whole_checkpoints_count(tmp_path):
    with Checkpoints(tmp_path, keep=2) as checkpoints:
        assert saved_steps(tmp_path) == []
        for step in (9, 10):
            checkpoints.save(step, STATE)
        checkpoints.wait()
    (tmp_path / "checkpoints" / "11.orbax-checkpoint-tmp").mkdir()
    (tmp_path / "checkpoints" / "notes.txt").write_text("mine")
    assert saved_steps(tmp_path) == [9, 10]
    assert saved_steps(tmp_path / "none") == []


def test_other_users_of_orbax_keep_their_own_way_of_writing():
    """What this module asks of Orbax holds for its checkpoints, not for the process."""
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    assert handler._min_slice_bytes_for_replica_parallel is None
