"""Which lengths a run that continues may take. Runs: see test_trainer.py."""

import pytest

from mixer_jax.run.changes import check_length
from mixer_jax.run.config import ConfigError, in_steps

from .test_trainer import tiny_config

EXAMPLES = 160  # ten batches


def check(step, old, **values):
    """Continues a run of the length `old` from `step` with the config `values`."""
    lengths = {f"total_{unit}": 0 for unit in ("steps", "epochs", "examples")}
    config = in_steps(tiny_config(**(lengths | values)), EXAMPLES)
    check_length(config, lengths | old, EXAMPLES, step)


@pytest.mark.parametrize("decay", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("step", [0, 1, 4, 5, 6, 100])
@pytest.mark.parametrize("warmup_steps", [0, 4])
def test_a_length_is_allowed_as_long_as_no_learning_rate_was_another(
    decay, step, warmup_steps
):
    values = {"decay_type": decay, "warmup_steps": warmup_steps, "total_steps": 200}
    # The first step after the warm-up has base_lr, whatever the length.
    if decay == "constant" or step <= warmup_steps + 1:
        check(step, {"total_steps": 100}, **values)
        return
    message = f"100 steps, and now 200. With decay_type {decay} the learning rate of "
    with pytest.raises(ConfigError, match=f"{message}step {warmup_steps + 2}, which"):
        check(step, {"total_steps": 100}, **values)


def test_lengths_of_any_unit_are_compared_in_steps():
    check(90, {"total_epochs": 10.0}, total_steps=100)
    check(90, {"total_epochs": 10.0}, total_examples=1600)
    with pytest.raises(ConfigError, match="has 100 steps, and now 110"):
        check(90, {"total_epochs": 10.0}, total_epochs=11.0)


def test_a_run_becomes_no_shorter_than_it_is():
    check(90, {"total_steps": 100}, total_steps=90, decay_type="constant")
    with pytest.raises(ConfigError, match=r"and now 89\. Step 90 is done"):
        check(90, {"total_steps": 100}, total_steps=89, decay_type="constant")
