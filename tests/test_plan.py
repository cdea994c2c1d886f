import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

from configs import b16, l16
from mixer_jax import plan as plan_module
from mixer_jax.compiled import Counts, read_collectives, read_out_of_memory
from mixer_jax.plan import CHIPS, PlanError, plan
from mixer_jax.run import program, trainer

from .run.test_trainer import tiny_config

ROOT = pathlib.Path(__file__).parents[1]

HLO = """
%all-reduce-scatter (input: f32[32,512]) -> f32[8,512] {
  %r = f32[32,512]{1,0} all-reduce(%input), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
}
%piece (p: bf16[512,512]) -> bf16[2048,512] {
  %a = bf16[2048,512]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=4, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}
}
ENTRY %main (p: bf16[512,512]) -> f32[] {
  %b = bf16[2048,512]{1,0} all-gather(%p), channel_id=4, replica_groups=mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}, dimensions={0}
  %c = (f32[100]{0}, f32[]) all-reduce(%x, %y), channel_id=7, replica_groups=[1,8]<=[8], to_apply=%add
  %d = (f32[10]{0}, f32[40]{0}) all-gather-start(%x), channel_id=8, replica_groups=[2,4]<=[8]
  %e = f32[40]{0} all-gather-done(%d)
  %f = (s8[10]{0}, s8[10]{0}, u32[]) collective-permute-start(%x), channel_id=9
}
"""  # noqa: E501


def test_bytes_of_collectives():
    assert read_collectives(HLO, 8) == {
        "all-gather": 3 / 4 * (2048 * 512 * 2 + 40 * 4),  # each once
        "all-reduce": 2 * 7 / 8 * 101 * 4,
        "collective-permute": 10,
        "reduce-scatter": 3 / 4 * 32 * 512 * 4,
    }


@pytest.mark.parametrize(
    "need",
    [
        "in memory space hbm. Used 33.50G of 15.75G hbm. Exceeded hbm capacity by 17.7",
        "on HBM, the total memory required for HLO temporaries (33.50G) exceeds availa",
    ],
)
def test_need_of_a_step_that_the_compiler_refuses(need):
    message = f"RESOURCE_EXHAUSTED: Ran out of memory {need}"
    assert read_out_of_memory(message) == 33.5 * 2**30
    assert read_out_of_memory("INTERNAL: something else") is None


def test_counts_add():
    total = Counts(1.0, 2.0, {"all-reduce": 3.0}).plus(
        Counts(1, 1, {"all-to-all": 2}), 3
    )
    assert total == Counts(4.0, 5.0, {"all-reduce": 3.0, "all-to-all": 6.0})


@pytest.mark.parametrize("topology", ["v9:2x2", "v5e", "v5e:2", "v5e-8", "tpu"])
def test_unknown_topology(topology):
    with pytest.raises(PlanError, match=f"'{topology}'; expected local, or one of v4"):
        plan(tiny_config(), topology)


def test_loops_are_counted_as_often_as_they_run():
    expected = plan(tiny_config(batch=64), "local", 10)
    assert expected.chips == 8
    assert expected.fits is None  # nobody says how much memory this CPU has
    assert expected.params_bytes == 2354 * 4
    assert expected.counts.sent_bytes["all-reduce"] >= 2 * 7 / 8 * 2354 * 4
    for overrides in (
        {"model.scan_blocks": True},
        {"accum_steps": 4},
        {"accum_steps": 4, "model.scan_blocks": True},
    ):
        found = plan(tiny_config(batch=64, **overrides), "local", 10)
        # Adding up the slices' gradients is work too.
        work = expected.counts.flops
        assert 0.98 * work < found.counts.flops < 1.15 * work, overrides
    report = str(found)
    assert "in 4 slice(s) on local: 8 chips, data 8 x fsdp 1" in report
    assert "Bounds" not in report


def test_state_of_l16_over_eight_devices_is_a_seventh_or_less_of_replicated():
    sizes = []
    for fsdp in (1, 8):
        mesh = trainer.sharding.create_mesh(fsdp)
        state = program.build_program(l16.get_config(), mesh, 1000).abstract_state
        sizes.append(
            plan_module._bytes_per_chip(state.params)
            + plan_module._bytes_per_chip(state.opt_state)
        )
    assert sizes[1] <= sizes[0] / 7


def test_what_is_tried_when_a_step_does_not_fit(monkeypatch):
    """A chip of 1 GB, and a compiler that tells the changes apart by their need."""
    gigabytes = {
        ("none", 1, 1): 9.0, ("blocks", 1, 1): 5.0, ("blocks", 4, 1): 3.0,
        ("blocks", 4, 2): 1.5, ("blocks", 4, 4): 0.9,
    }  # fmt: skip

    def compile_step(config, devices, num_classes, unroll=1):
        key = (config.model.remat, config.mesh.fsdp, config.accum_steps)
        peak = int(gigabytes[key] * 1e9)
        return plan_module._Step(int(4e8), int(2e8), peak - int(6e8), peak, 1.0, None)

    kind = jax.devices()[0].device_kind
    chip = plan_module.Chip(kind, 1e9, 1e12, 1e11)
    monkeypatch.setattr(plan_module, "CHIPS", {"v1": chip})
    monkeypatch.setattr(plan_module, "_compile", compile_step)
    config = b16.get_config()
    config.accum_steps = 1
    result = plan(config, "local")
    assert result.fits is False
    assert [peak for _, peak in result.changes] == [5e9, 3e9, 1.5e9, 0.9e9]
    assert result.changes[-1][0] == {
        "model.remat": "blocks", "mesh.fsdp": 4, "accum_steps": 4,
    }  # fmt: skip
    report = str(result)
    assert "900 % of 1 GB: DOES NOT FIT" in report
    assert re.search(r"0.900 GB +fits: .*--config.accum_steps=4", report)


def test_batch_that_the_chips_do_not_divide():
    with pytest.raises(trainer.ConfigError, match=r"8 devices .*multiple of 8"):
        plan(tiny_config(batch=12), "local")


def plan_for_tpu(*args, status=0):
    done = subprocess.run(
        [sys.executable, "-c", "from mixer_jax.cli import main; main()", "plan",
         "--config=configs/digits.py", "--topology=v5e:2x2", "--num-classes=10",
         "--config.model.num_blocks=1", *args],
        cwd=ROOT, capture_output=True, text=True, timeout=500,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
    )  # fmt: skip
    assert done.returncode == status, done.stderr
    return done.stdout


needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs the extra tpu"
)


@needs_libtpu
def test_plan_for_a_tpu_from_the_command_line():
    report = plan_for_tpu()
    assert "bfloat16, remat blocks" in report
    assert "v5e:2x2: 4 chips, data 4 x fsdp 1" in report
    assert "of 16 GB: fits" in report
    compute = float(re.search(r"compute +([\d.]+) ms", report)[1]) / 1e3
    tflop = float(re.search(r"([\d.]+) TFLOP", report)[1])
    assert compute == pytest.approx(tflop * 1e12 / CHIPS["v5e"].flops_per_sec, rel=0.5)
    assert "all-reduce" in report


@needs_libtpu
@pytest.mark.slow
def test_plan_for_a_tpu_whose_memory_is_too_small():
    report = plan_for_tpu("--config.batch=4194304", status=1)
    need = float(re.search(r"peak +([\d.]+) GB +\d+ % of 16 GB: DOES NOT", report)[1])
    less = float(re.search(r"([\d.]+) GB +fits: --config.accum_steps=2", report)[1])
    assert less < 16 < need < 32
