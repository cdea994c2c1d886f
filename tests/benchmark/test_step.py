import jax
import jax.numpy as jnp
import pytest

from configs import b16, digits
from mixer_jax.benchmark import step
from mixer_jax.benchmark.step import benchmark_step, model_flops, sweep
from mixer_jax.run.config import ConfigError
from mixer_jax.training import sharding

from ..run.test_trainer import tiny_config


def test_every_combination_is_a_config():
    found = sweep(b16.get_config(), ["S/32", "Mixer-B_16"], [8, 16], ["bfloat16"], [64])
    assert [
        (x.model.model_name, x.model.num_blocks, x.batch, x.model.dtype, x.pp.crop)
        for x in found
    ] == [
        (name, blocks, batch, "bfloat16", 64)
        for name, blocks in (("Mixer-S_32", 8), ("Mixer-B_16", 12))
        for batch in (8, 16)
    ]
    assert tuple(found[0].model.patches.size) == (32, 32)


def test_a_config_alone_is_measured_as_it_is():
    config = digits.get_config()
    (found,) = sweep(config)
    assert found.batch == config.batch
    assert found.model.hidden_dim == config.model.hidden_dim


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"variants": ["B/17"]}, "No Mixer variant is called 'B/17'"),
        ({"sizes": [18]}, "pp.crop is 18.* cannot be cut into patches"),
        ({"dtypes": ["int8"]}, "model.dtype is 'int8'"),
    ],
)
def test_what_cannot_be_measured_is_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        sweep(digits.get_config(), **values)


def test_operations_are_those_of_the_products_whatever_is_recomputed():
    mesh = sharding.create_mesh()
    config = tiny_config(batch=64)
    batch, tokens, patch = 64, 4, 4 * 4 * 3
    dim, token_units, channel_units, blocks = 16, 8, 16, 2
    products = patch * dim * tokens
    products += blocks * 2 * tokens * dim * (token_units + channel_units)
    products += dim * 10
    found = model_flops(config, mesh, 10)
    # Small as it is, norms and GELUs count for more than in a model of use.
    assert 1 < found["forward"] / (2 * batch * products) < 2
    assert 2.5 < found["train"] / found["forward"] < 4
    changes = {"model.remat": "blocks", "model.scan_blocks": True, "accum_steps": 4}
    # The operations are those of all devices, however many.
    mesh = sharding.create_mesh(1, jax.devices()[:1])
    assert model_flops(tiny_config(batch=64, **changes), mesh, 10) == found


def test_a_batch_that_is_too_large_for_the_memory_has_a_row(monkeypatch):
    def allocate(config, mesh, num_classes, repeats):
        return jax.block_until_ready(jnp.zeros(2**50))

    monkeypatch.setattr(step, "_rows", allocate)
    rows = list(benchmark_step([tiny_config(batch=64), tiny_config()], 10, 5))
    assert [(x["batch"], x["step"]) for x in rows] == [
        (64, "out of memory"),
        (16, "out of memory"),
    ]
