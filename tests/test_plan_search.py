"""A compiler that knows needs by remat, accum_steps and fsdp stands in for XLA."""

import dataclasses
import itertools

import pytest

from configs import b16
from mixer_jax import plan as plan_module
from mixer_jax.cli.runs import plan as command
from mixer_jax.plan import Needs, PlanError
from mixer_jax.plan_search import compare, fastest, find_best

from .run.test_trainer import tiny_config

# The whole step on 8 chips of 1 GB, each bounded by 1 s of every kind.
NEEDS = Needs(1e8, 5e7, 5e8, 7e8, flops=1e12, memory_bytes=1e11, network_bytes=1e10)


@pytest.fixture
def search(monkeypatch, chip_of_1_gb):
    def search(**figures):
        """Each figure is of the step that is tried first, or a function of settings."""

        def compile_step(config, devices, num_classes, one_turn=False):
            settings = config.model.remat, config.accum_steps, config.mesh.fsdp
            changed = {
                key: value(*settings) if callable(value) else value
                for key, value in figures.items()
            }
            found = dataclasses.replace(NEEDS, **changed)
            rest = found.params_bytes + found.opt_state_bytes
            return dataclasses.replace(found, peak_bytes=rest + found.temporary_bytes)

        monkeypatch.setattr(plan_module, "_compile", compile_step)
        tried = find_best(b16.get_config(), "local")
        return tried, [tuple(x.settings.values()) for x in tried]

    return search


def test_a_step_bound_by_its_operations_is_the_only_one_compiled(search):
    tried, settings = search(flops=2e12)
    assert settings == [("none", 1, 1)]
    assert fastest(tried) is tried[0]
    flags = "--config.model.remat=none --config.accum_steps=1 --config.mesh.fsdp=1"
    assert f"The fastest that fits: {flags}" in compare(tried)
    assert "0.65    2000.0  model.remat=none" in compare(tried)


def test_a_step_bound_by_memory_is_compared_with_those_that_may_move_less(search):
    tried, settings = search(
        flops=lambda remat, *_: 1.2e12 if remat == "blocks" else 1e12,
        memory_bytes=lambda remat, *_: 1.1e11 if remat == "blocks" else 2e11,
    )
    assert settings == [("none", 1, 1), ("blocks", 1, 1), ("none", 1, 8)]
    assert fastest(tried) is tried[1]
    assert max(tried[1].bounds_secs.values()) == pytest.approx(1.2)


def test_a_step_bound_by_the_network_is_compared_with_another_split(search):
    tried, settings = search(network_bytes=lambda _, accum, fsdp: 3e10 - fsdp * 1e9)
    assert settings == [("none", 1, 1), ("none", 1, 8)]
    assert fastest(tried) is tried[1]


def test_slices_that_cannot_fit_are_passed_over(search):
    tried, settings = search(temporary_bytes=lambda _, accum, fsdp: 5e9 / accum)
    # Beside a state and a gradient of 0.3 GB there is room for an eighth.
    assert settings == [("none", 1, 1), ("none", 8, 1)]
    assert fastest(tried) is tried[1]
    assert "5.15   unknown" not in compare(tried)
    assert "(does not fit)" in compare(tried)


def test_a_large_state_is_split_before_the_slices_get_smaller(search):
    tried, settings = search(
        params_bytes=lambda _, accum, fsdp: 6e8 / fsdp,
        temporary_bytes=lambda _, accum, fsdp: 9e8 / accum,
    )
    assert settings == [("none", 1, 1), ("none", 1, 4), ("none", 2, 4)]
    assert fastest(tried) is tried[2]


def test_nothing_is_computed_twice_while_smaller_slices_are_left(search):
    tried, settings = search(temporary_bytes=1e10, refusal="Used 9G of 1G hbm.")
    # Of 64 slices, each is one image a chip.
    assert settings == [
        *(("none", accum, 1) for accum in (1, 16, 32, 64)),
        ("blocks", 64, 1),
        ("blocks", 64, 8),
    ]
    assert fastest(tried) is None
    assert "Nothing fits." in compare(tried)


def test_no_more_is_tried_than_the_listed_settings_allow(search):
    """Whatever the needs, a batch can be cut that way on 8 chips."""
    tried, settings = search(temporary_bytes=lambda _, accum, fsdp: float("nan"))
    assert len(set(settings)) == len(settings)
    for (_, accum, fsdp), one in zip(settings, tried, strict=True):
        assert one.config.batch % (accum * one.chips) == 0
        assert one.chips % fsdp == 0
    accums = [accum for _, accum, _ in settings]
    assert all(a <= b for a, b in itertools.pairwise(accums))


def test_the_command_prints_the_best_plan_and_its_flags(search, capsys):
    search(flops=2e12)
    command("configs/b16.py", "local", best=True)
    out = capsys.readouterr().out
    assert "one update of 512 images in 1 slice(s) on local" in out
    assert "The fastest that fits: --config.model.remat=none" in out


def test_the_command_says_what_makes_a_step_fit(search, capsys):
    search(temporary_bytes=lambda _, accum, fsdp: 5e9 / accum)
    flags = ("config.accum_steps=1", "config.model.remat=none")
    with pytest.raises(SystemExit, match="1"):
        command("configs/b16.py", "local", flags)
    out, progress = capsys.readouterr()
    assert "515 % of 1 GB: DOES NOT FIT" in out
    assert "--config.accum_steps=8 --config.mesh.fsdp=1" in out
    assert progress.count("accum_steps=1 ") == 0  # that plan is there already


def test_devices_without_published_figures_cannot_be_compared(monkeypatch):
    def compile_step(*_):
        raise AssertionError("It takes minutes, for nothing.")

    monkeypatch.setattr(plan_module, "_compile", compile_step)
    with pytest.raises(PlanError, match="no published figures for the device 'cpu'"):
        find_best(tiny_config(), "local")
