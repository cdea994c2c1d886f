"""What of a config may change between two starts of a run."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from mixer_jax.run.config import Config, ConfigError, in_steps
from mixer_jax.run.keys import row_of
from mixer_jax.run.program import schedule

# A run's parameters do not depend on these, but for the rounding of mesh.fsdp.
FREE_KEYS = {
    "batch_eval",
    "checkpoint_every",
    "eval_every",
    "evals.*.every",
    "keep_checkpoints",
    "max_run_secs",
    "mesh.fsdp",
    "nonfinite_limit",
    "on_nonfinite",
    "prefetch",
    "profile_steps",
    "progress_every",
    "tfds_data_dir",
    "tfds_manual_dir",
    "workers",
}

# The length of a run may change if its steps so far would have been the same.
LENGTH_KEYS = {"total_steps", "total_epochs", "total_examples"}


def may_change(key: str) -> str:
    """Says whether a key may change between two starts; "" for no."""
    if row_of(key) in FREE_KEYS:
        return "may change"
    if key in LENGTH_KEYS:
        return "may change if the steps done keep their learning rates"
    return ""


def check_length(
    config: Config, recorded: Mapping[str, Any], num_examples: int, step: int
) -> None:
    """Refuses another length of a run if the steps done would have been others.

    The rates are compared, not the names of schedules: so a run may also become longer
    or shorter in its warm-up.

    Args:
      config: of the run, with durations in steps.
      recorded: the flat config of its last start; empty if it has no result.
      num_examples: of the training split.
      step: that the run continues from.

    Raises:
      ConfigError: the run is longer already, or had another learning rate.
    """
    if not step or not recorded:
        return
    old = config.copy_and_resolve_references()
    with old.ignore_type():
        old.update({key: recorded.get(key, 0) for key in LENGTH_KEYS})
    old = in_steps(old, num_examples)
    if old.total_steps == config.total_steps:
        return
    lengths = f"The run has {old.total_steps} steps, and now {config.total_steps}. "
    advice = " Take another --workdir, or the same length to continue the run."
    if step > config.total_steps:
        raise ConfigError(f"{lengths}Step {step} is done.{advice}")
    rates = (schedule(x)(jnp.arange(step)) for x in (old, config))
    then, now = (np.broadcast_to(x, step) for x in rates)
    for i in np.flatnonzero(then != now)[:1]:
        raise ConfigError(
            f"{lengths}With decay_type {config.decay_type} the learning rate of step "
            f"{i + 1}, which is done, was {then[i]:.4g} and would be {now[i]:.4g}."
            f"{advice} To train on from its parameters, use init_from."
        )
