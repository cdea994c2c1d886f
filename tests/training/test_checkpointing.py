import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from mixer_jax.run import program
from mixer_jax.training import sharding
from mixer_jax.training.checkpointing import Checkpoints

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
