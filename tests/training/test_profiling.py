import gzip
import json

import jax
import jax.numpy as jnp
import pytest

from mixer_jax.run import trainer
from mixer_jax.training.profiling import WARMUP_STEPS, Profiler

from ..run.test_trainer import tiny_config


def traced_steps(folder):
    """The numbers of the steps in the one trace under a folder."""
    (trace,) = folder.glob("plugins/profile/*/*.trace.json.gz")
    assert list(trace.parent.glob("*.xplane.pb"))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    return sorted(
        int(event["args"]["step_num"])
        for event in events
        if event.get("name") == "train" and "step_num" in event.get("args", {})
    )


def run(folder, num_steps, total):
    double = jax.jit(lambda x: 2 * x)
    with Profiler(folder, num_steps) as profiler:
        for step in range(1, total + 1):
            with profiler.step(step):
                jax.block_until_ready(double(jnp.ones(3)))


def test_as_many_steps_are_traced_as_asked_for(tmp_path):
    run(tmp_path, 2, WARMUP_STEPS + 6)
    first = WARMUP_STEPS + 1
    assert set(traced_steps(tmp_path)) >= {first, first + 1}
    assert not set(traced_steps(tmp_path)) & {first - 1, first + 3}


def test_a_run_that_ends_in_its_trace_writes_it(tmp_path):
    run(tmp_path, 10, WARMUP_STEPS + 2)
    assert traced_steps(tmp_path) == [WARMUP_STEPS + 1, WARMUP_STEPS + 2]


@pytest.mark.parametrize(("num_steps", "total"), [(0, 9), (5, WARMUP_STEPS)])
def test_nothing_is_traced(tmp_path, caplog, num_steps, total):
    run(tmp_path, num_steps, total)
    assert not list(tmp_path.iterdir())
    assert ("nothing is traced" in caplog.text) == bool(num_steps)


def test_a_run_writes_its_trace_beside_the_curves(tmp_path, capsys):
    config = tiny_config()
    expected = trainer.train_and_evaluate(config, tmp_path / "plain")
    config.profile_steps = 3
    assert trainer.train_and_evaluate(config, tmp_path / "run") == expected
    assert {4, 5, 6} <= set(traced_steps(tmp_path / "run" / "tensorboard"))
    assert "profile  of 3 steps in" in capsys.readouterr().out
