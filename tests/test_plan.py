import dataclasses
import functools
import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from configs import b16, common, digits, l16
from mixer_jax import plan as plan_module
from mixer_jax.model import MlpMixer
from mixer_jax.plan import Needs, PlanError, plan
from mixer_jax.run import config as run_config
from mixer_jax.run import program, trainer
from mixer_jax.run.chips import CHIPS

from .run.test_trainer import tiny_config

ROOT = pathlib.Path(__file__).parents[1]


def test_a_model_without_the_fields_for_devices_has_a_plan(monkeypatch):
    """As of a fork that has dropped them."""
    dropped = {"dtype", "remat", "scan_blocks"}
    fields = [x for x in dataclasses.fields(MlpMixer) if x.name not in dropped]
    monkeypatch.setattr(common.dataclasses, "fields", lambda _: fields)
    model = common.get_model("Mixer-S_32")
    monkeypatch.undo()
    assert dropped.isdisjoint(model)
    monkeypatch.setattr(plan_module, "_compile", lambda *_: Needs(1, 1, 1, 1, 1, 1))
    config = b16.get_config()
    config.model = model
    result = plan(config, "local")
    assert str(result).startswith("Mixer-S_32, 224 x 224 pixels, -, remat -")
    assert result.settings == {"accum_steps": 8, "mesh.fsdp": 1}


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:2", "v5e-8", "tpu"])
def test_unknown_topology(topology):
    with pytest.raises(PlanError, match=f"'{topology}'; expected local, or one of v4"):
        plan(tiny_config(), topology)


@pytest.mark.slow
def test_slices_of_the_batch_do_the_work_of_the_whole():
    whole = plan(tiny_config(batch=64), "local", 10)
    assert whole.chips == 8
    assert whole.needs.params_bytes == 2354 * 4
    for overrides in (
        {"model.scan_blocks": True},
        {"accum_steps": 4},
        {"accum_steps": 4, "model.scan_blocks": True},
    ):
        found = plan(tiny_config(batch=64, **overrides), "local", 10)
        # Adding up the slices' gradients is work too.
        work = whole.needs.flops
        assert 0.98 * work < found.needs.flops < 1.15 * work, overrides
    assert "in 4 slice(s) on local: 8 chips, data 8 x fsdp 1" in str(found)


@pytest.mark.parametrize("sam_rho", [0.0, 0.05])  # with SAM there are two loops
def test_every_turn_of_a_loop_is_counted(sam_rho, monkeypatch):
    config = digits.get_config()
    config.update_from_flattened_dict(
        {"batch": 128, "accum_steps": 4, "model.num_blocks": 1, "sam_rho": sam_rho}
    )
    found = plan(config, "local", 10).needs
    # The same step with its loops unrolled, so that XLA counts each turn.
    unrolled = functools.partial(jax.lax.scan, unroll=True)
    monkeypatch.setattr(jax.lax, "scan", unrolled)
    config = run_config.for_platform(config, "cpu")
    expected = plan_module._compile(config, jax.devices(), 10)
    assert found.flops == pytest.approx(expected.flops, rel=0.02)
    assert found.memory_bytes == pytest.approx(expected.memory_bytes, rel=0.1)


def test_report_without_published_figures_says_why_it_has_no_bounds():
    result = plan(tiny_config(), "local", 10)
    assert result.fits is None
    report = str(result)
    assert "whether it fits is not known" in report
    assert "No bounds: mixer_jax/run/chips.py has no published figures" in report
    assert "for the device 'cpu'" in report
    assert "at most" not in report


def test_state_of_l16_over_eight_devices_is_a_seventh_or_less_of_replicated():
    sizes = []
    for fsdp in (1, 8):
        mesh = trainer.sharding.create_mesh(fsdp)
        state = program.build_program(l16.get_config(), mesh, 1000).abstract_state
        sizes.append(
            trainer.sharding.bytes_per_device(state.params)
            + trainer.sharding.bytes_per_device(state.opt_state)
        )
    assert sizes[1] <= sizes[0] / 7


def test_report_of_a_step_that_compiles_but_does_not_fit(monkeypatch, chip_of_1_gb):
    needs = Needs(4e8, 2e8, 8.4e9, 9e9, 1e12, 1e11, 3e10)
    monkeypatch.setattr(plan_module, "_compile", lambda *args: needs)
    result = plan(tiny_config(), "local")
    assert result.fits is False
    assert "900 % of 1 GB: DOES NOT FIT" in str(result)
    assert result.bounds_secs == {"compute": 1, "memory": 1, "network": 3}
    # 16 images in the slowest of these times.
    assert re.search(r"at most +5.33 images/s", str(result))


@pytest.mark.parametrize("accum_steps", [1, 2])
def test_report_of_a_step_that_the_compiler_refuses(
    accum_steps, monkeypatch, chip_of_1_gb
):
    needs = Needs(4e8, 2e8, refusal="Used 9G of 1G hbm.")
    monkeypatch.setattr(plan_module, "_compile", lambda *args: needs)
    report = str(plan(tiny_config(accum_steps=accum_steps), "local"))
    assert re.search(r"peak +unknown +DOES NOT FIT", report)
    assert "The compiler says: Used 9G of 1G hbm." in report
    assert "Bounds" not in report


def test_batch_that_the_chips_do_not_divide():
    with pytest.raises(trainer.ConfigError, match=r"8 devices .*multiple of 8"):
        plan(tiny_config(batch=12), "local")


@pytest.mark.parametrize(
    ("changes", "units"),
    [
        ({"pp.crop": 448}, 1536),
        ({"pp.crop": (448, 224)}, 768),
        ({"model.patches.size": (8, 8)}, 1536),
        ({"pp.crop": 448, "model.patches.size": (32, 32)}, None),
        ({"pp.crop": 448, "model.tokens_mlp_dim": 1536}, None),
        ({"pp.crop": 448, "resolution": "interpolate"}, None),
        ({"pp.crop": 448, "model.model_name": "mine"}, None),
    ],
)
def test_units_that_the_run_takes_from_its_file_must_be_given(
    changes, units, monkeypatch
):
    """Otherwise the plan would be of a smaller model than the run's."""
    monkeypatch.setattr(plan_module, "_compile", lambda *_: Needs(1, 1, 1, 1, 1, 1))
    config = b16.get_config()
    config.update_from_flattened_dict(
        {"resolution": "block_diagonal", "pp.resize": 512} | changes
    )
    if units is None:
        assert plan(config, "local").config.resolution == config.resolution
        return
    with pytest.raises(trainer.ConfigError, match=f"Give .*tokens_mlp_dim={units}"):
        plan(config, "local")


def test_a_config_with_a_size_has_the_units(monkeypatch):
    monkeypatch.setattr(plan_module, "_compile", lambda *_: Needs(1, 1, 1, 1, 1, 1))
    result = plan(b16.get_config("cifar10,448"), "local")
    assert result.config.model.tokens_mlp_dim == 1536


def plan_for_tpu(batch):
    """Returns a report; in a process of its own, whose environment the plan sets."""
    flags = [
        "--config=configs/digits.py", "--topology=v5e:2x2", "--num-classes=10",
        "--config.model.num_blocks=1", f"--config.batch={batch}",
    ]  # fmt: skip
    # Without the search that follows if a step does not fit.
    code = (
        "import sys; from mixer_jax import plan_search; "
        "from mixer_jax.cli import main; "
        "plan_search.find_best = lambda *args, **options: []; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", *flags],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1", "XLA_FLAGS": ""},
    )  # fmt: skip
    return done.stdout, done.returncode


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)


@needs_libtpu
def test_plan_for_a_tpu_from_the_command_line():
    report, status = plan_for_tpu(64)
    assert status == 0
    assert "bfloat16, remat none" in report
    assert "v5e:2x2: 4 chips, data 4 x fsdp 1" in report
    assert "of 16 GB: fits" in report
    compute = float(re.search(r"compute +([\d.]+) ms", report)[1]) / 1e3
    tflop = float(re.search(r"([\d.]+) TFLOP", report)[1])
    assert compute == pytest.approx(tflop * 1e12 / CHIPS["v5e"].flops_per_sec, rel=0.5)


@needs_libtpu
@pytest.mark.slow
def test_plan_for_a_tpu_whose_memory_is_too_small():
    report, status = plan_for_tpu(4194304)
    assert status == 1
    assert re.search(r"peak +unknown +DOES NOT FIT\n", report)
    assert re.search(r"The compiler says: .*exceeds available HBM", report)
