import errno
import json
import os
import re
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType

from mixer_jax.files import DiskError
from mixer_jax.run import program
from mixer_jax.training import checkpointing, manifest, sharding
from mixer_jax.training.checkpointing import (
    Checkpoints,
    read_latest_params,
    saved_steps,
)
from mixer_jax.training.manifest import DamagedError

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
    message = r"could not be saved either: DiskError: .*No space left"
    assert re.search(message, caplog.text)


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


def test_arrays_that_are_much_larger_than_their_files_are_refused(
    tmp_path, monkeypatch
):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, STATE)
    assert read_latest_params(tmp_path)[1] == 1
    monkeypatch.setattr(checkpointing, "most_array_bytes", lambda size: 23)
    with pytest.raises(DamagedError, match=r"All checkpoints in .* are damaged"):
        read_latest_params(tmp_path)


def state(step):
    """Differs from that of any other step in each array."""
    params = {"a": step + jax.numpy.arange(6.0), "b": jax.numpy.full((2, 2), step)}
    return {"step": jax.numpy.int32(step), "params": params}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the checkpoints of the steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("saved")
    with Checkpoints(workdir, keep=2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state(step), {"loss_sum": step})
        checkpoints.wait()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restored(workdir):
    """Restores as a run does; returns the step that it goes on from."""
    with Checkpoints(workdir, keep=2) as checkpoints:
        found = checkpoints.restore(state(0))
        step = checkpoints.latest_step()
        assert checkpoints.latest_numbers() == {"loss_sum": step}
    jax.tree.map(np.testing.assert_array_equal, found, state(step))
    return step


def flip(path):
    contents = bytearray(path.read_bytes())
    contents[len(contents) // 2] ^= 1
    path.write_bytes(contents)


DAMAGES = {
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "removed": lambda path: path.unlink(),
    "flipped": flip,
}
# Orbax writes them, and nobody reads them where there is a manifest.
UNUSED = ("2/commit_success.txt", "2/_CHECKPOINT_METADATA")


@pytest.mark.parametrize("damage", DAMAGES)
def test_any_damage_to_any_file_is_found(saved, tmp_path, damage, caplog, capfd):
    files = [x for x in (saved / "checkpoints" / "2").rglob("*") if x.is_file()]
    assert len(files) > 8
    for i, path in enumerate(files):
        workdir = shutil.copytree(saved, tmp_path / str(i))
        damaged = workdir / path.relative_to(saved)
        DAMAGES[damage](damaged)
        # Without a manifest the checkpoint is read, and is as good as before.
        harmless = str(path).endswith(UNUSED) or (
            path.name == "manifest.json" and damage == "removed"
        )
        caplog.clear()
        params, step = read_latest_params(workdir)
        jax.tree.map(np.testing.assert_array_equal, params, state(step)["params"])
        assert step == (2 if harmless else 1)
        assert saved_steps(workdir) == [1, 2]  # only a run changes its folder
        assert len(caplog.records) == (not harmless)

        caplog.clear()
        assert restored(workdir) == step
        if harmless:
            assert not caplog.records
            continue
        (warning,) = caplog.messages
        assert path.name in warning
        assert str(workdir / "checkpoints" / "2") in warning
        names = {x.name for x in (workdir / "checkpoints").iterdir()}
        assert names == {"1", "2.damaged"}
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_a_checkpoint_of_an_older_run(workdir, damage, caplog, capfd):
    """Which has no manifest, is found if the checkpoint cannot be read."""
    for path in workdir.glob("checkpoints/*/manifest.json"):
        path.unlink()
    assert restored(workdir) == 2
    (path,) = (workdir / "checkpoints" / "2" / "default" / "d").iterdir()
    DAMAGES[damage](path)
    assert read_latest_params(workdir)[1] == restored(workdir) == 1
    assert len(caplog.records) == 2
    assert caplog.messages[0].count("cannot be read") == 1
    assert "Traceback" not in capfd.readouterr().err


NOT_NOW = [
    PermissionError(errno.EACCES, "Permission denied"),
    OSError(errno.EMFILE, "Too many open files"),
    ValueError("Failed reading [os_error_code='116'] [tensorstore_spec='{}']"),
    MemoryError("Unable to allocate 9 TiB"),
]


@pytest.mark.parametrize("error", NOT_NOW)
@pytest.mark.parametrize("has_manifest", [True, False])
def test_what_cannot_be_read_now_is_left_as_it_is(
    workdir, monkeypatch, error, has_manifest
):
    def fail(*args, **kwargs):
        raise error

    if has_manifest:
        monkeypatch.setattr(manifest, "_hash_of_file", fail)
    else:
        (workdir / "checkpoints" / "2" / "manifest.json").unlink()
        monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    kind = MemoryError if isinstance(error, MemoryError) else DiskError
    for read in (read_latest_params, restored):
        with pytest.raises(kind) as caught:
            read(workdir)
        if kind is DiskError:
            number = 116 if isinstance(error, ValueError) else error.errno
            assert f"2 cannot be read: {os.strerror(number)}. It" in str(caught.value)
    monkeypatch.undo()
    assert saved_steps(workdir) == [1, 2]
    assert restored(workdir) == 2


def test_a_checkpoint_elsewhere_is_no_fault_of_the_disk(workdir, monkeypatch):
    monkeypatch.setattr(ocp.utils, "TMP_DIR_SUFFIX", ".other")
    with (
        pytest.raises(RuntimeError, match=rf"^Orbax {ocp.__version__} does not write"),
        Checkpoints(workdir, keep=1) as checkpoints,
    ):
        checkpoints.save(3, state(3))


def test_a_run_without_whole_checkpoints_does_not_begin_again(workdir, caplog):
    for step in (1, 2):
        (workdir / "checkpoints" / str(step) / "default" / "_METADATA").unlink()
    with pytest.raises(DamagedError, match=r"All checkpoints in .* are damaged"):
        read_latest_params(workdir)
    for _ in range(2):
        with pytest.raises(
            DamagedError, match=r"see 1\.damaged, 2\.damaged in .*To con"
        ):
            Checkpoints(workdir, keep=2)
    with pytest.raises(FileNotFoundError, match="has not reached"):
        read_latest_params(workdir)
    # What the message says helps.
    (workdir / "checkpoints" / "2.damaged").rename(workdir / "checkpoints" / "2")
    (workdir / "checkpoints" / "2" / "manifest.json").unlink()
    with pytest.raises(DamagedError, match=r"2\.damaged"):
        Checkpoints(workdir, keep=2)
    shutil.rmtree(workdir / "checkpoints")
    with Checkpoints(workdir, keep=2) as checkpoints:
        assert checkpoints.latest_step() is None


def test_each_damaged_copy_is_kept(workdir, caplog):
    first = workdir / "checkpoints" / "1"
    for name in ("2.damaged", "2.damaged1"):
        shutil.copytree(first, workdir / "checkpoints" / "2", dirs_exist_ok=True)
        flip(workdir / "checkpoints" / "2" / "manifest.json")
        assert restored(workdir) == 1
        assert (workdir / "checkpoints" / name).is_dir()


def test_arrays_are_compared_with_those_that_were_saved(workdir, caplog, monkeypatch):
    """Files may be whole, and what is made of them on the way to a device not."""
    restore = ocp.CheckpointManager.restore

    def restore_wrong(self, step, **kwargs):
        found = restore(self, step, **kwargs)
        if step == 2:
            found["params"]["b"] += 1
        return found

    monkeypatch.setattr(ocp.CheckpointManager, "restore", restore_wrong)
    assert restored(workdir) == 1
    (warning,) = caplog.messages
    assert "2 is damaged: the array params/b has other values" in warning


def test_what_cannot_be_read_back_is_no_checkpoint(workdir, monkeypatch):
    """So the older one, which it would replace, stays."""

    def read(folder):
        flip(next((folder / "default" / "d").iterdir()))
        return original(folder)

    original = checkpointing._read
    monkeypatch.setattr(checkpointing, "_read", read)
    with (
        pytest.raises(DamagedError, match="cannot be read"),
        Checkpoints(workdir, keep=1) as checkpoints,
    ):
        checkpoints.save(3, state(3))
    assert saved_steps(workdir) == [1, 2]
    assert restored(workdir) == 2


def test_a_manifest_holds_each_file_and_array(workdir):
    folder = workdir / "checkpoints" / "2"
    found = json.loads((folder / "manifest.json").read_text())
    assert found["arrays"].keys() == {"step", "params/a", "params/b"}
    files = {str(x.relative_to(folder)) for x in folder.rglob("*") if x.is_file()}
    assert files - found["files"].keys() == {
        "_CHECKPOINT_METADATA",
        "commit_success.txt",
        "manifest.json",
    }
    assert found["numbers"] == {"loss_sum": 2}


def test_other_users_of_orbax_keep_their_own_way_of_writing():
    """What this module asks of Orbax holds for its checkpoints, not for the process."""
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    assert handler._min_slice_bytes_for_replica_parallel is None
