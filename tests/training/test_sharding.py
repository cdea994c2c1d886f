import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from mixer_jax.training import sharding


def test_large_arrays_are_split_along_their_longest_divisible_axis():
    mesh = sharding.create_mesh(fsdp=4)
    shapes = {
        "kernel": jax.ShapeDtypeStruct((768, 3072), jnp.float32),
        "tall": jax.ShapeDtypeStruct((4096, 1022), jnp.float32),
        "odd": jax.ShapeDtypeStruct((1023, 1021), jnp.float32),
        "bias": jax.ShapeDtypeStruct((3072,), jnp.float32),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    specs = {k: s.spec for k, s in sharding.state_shardings(mesh, shapes).items()}
    assert specs == {
        "kernel": PartitionSpec(None, "fsdp"),
        "tall": PartitionSpec("fsdp"),
        "odd": PartitionSpec(),
        "bias": PartitionSpec(),
        "step": PartitionSpec(),
    }


def test_nothing_is_split_without_fsdp():
    mesh = sharding.create_mesh()
    assert dict(mesh.shape) == {"data": 8, "fsdp": 1}
    kernel = jax.ShapeDtypeStruct((768, 3072), jnp.float32)
    assert sharding.state_shardings(mesh, kernel).spec == PartitionSpec()


@pytest.mark.parametrize("fsdp", [1, 2, 8])
def test_batches_are_split_over_all_devices(fsdp):
    mesh = sharding.create_mesh(fsdp)
    batch = {"image": np.arange(16 * 3).reshape(16, 3), "label": np.arange(16)}
    sent = sharding.shard_batch(mesh, batch)
    for key, rows in batch.items():
        np.testing.assert_array_equal(sent[key], rows)
        assert {s.data.shape[0] for s in sent[key].addressable_shards} == {2}


@pytest.mark.parametrize("fsdp", [0, 3, 16])
def test_fsdp_that_does_not_divide_the_devices(fsdp):
    with pytest.raises(ValueError, match=f"mesh.fsdp is {fsdp}.* 8 devices"):
        sharding.create_mesh(fsdp)


def test_xla_gathers_split_parameters_whole_on_tpu():
    """The option is XLA's for TPU; on CPU it would be refused."""

    class Tpu:
        platform = "tpu"

    def mesh(device, fsdp):
        shape = types.SimpleNamespace(flat=[device])
        return types.SimpleNamespace(shape={"fsdp": fsdp}, devices=shape)

    assert sharding.compiler_options(mesh(Tpu, 4))
    assert sharding.compiler_options(mesh(Tpu, 1)) is None
    assert sharding.compiler_options(sharding.create_mesh(fsdp=4)) is None
