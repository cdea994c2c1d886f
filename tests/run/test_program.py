import jax
import pytest

from mixer_jax.run import chips
from mixer_jax.run.chips import Chip
from mixer_jax.run.program import for_devices

from .test_trainer import tiny_config


def remat(monkeypatch, hbm_bytes, **overrides):
    """Returns what for_devices chooses on 8 devices with so much memory."""
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(chips.CHIPS, "v1", Chip(kind, hbm_bytes))
    config = tiny_config(**{"batch": 64, **overrides})
    return for_devices(config, jax.devices()).model.remat


def test_blocks_are_computed_twice_only_where_memory_is_short(monkeypatch):
    sizes = [2**i for i in range(14, 22)]
    chosen = [remat(monkeypatch, size) for size in sizes]
    least = chosen.index("none")
    assert chosen == ["blocks"] * least + ["none"] * (len(sizes) - least)
    state = 3 * 4 * 2354  # parameters, gradient, and Adam's moments, one in bfloat16
    assert state < sizes[least] < 20 * state
    # In a memory that is just too small for the batch, there is room for its slices.
    assert remat(monkeypatch, sizes[least - 1], accum_steps=4) == "none"


def test_a_config_that_names_remat_keeps_it(monkeypatch):
    assert remat(monkeypatch, 1e12, **{"model.remat": "blocks"}) == "blocks"
    assert remat(monkeypatch, 1e3, **{"model.remat": "none"}) == "none"


@pytest.mark.parametrize("scan_blocks", [False, True])
def test_devices_without_figures_compute_nothing_twice(scan_blocks):
    config = tiny_config(**{"model.scan_blocks": scan_blocks})
    assert for_devices(config, jax.devices()).model.remat == "none"
