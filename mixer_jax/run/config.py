"""What a config may say, checked before anything is opened."""

import logging
import math
from typing import Any

import ml_collections

from mixer_jax.blocks import REMAT_POLICIES
from mixer_jax.data import preprocess
from mixer_jax.data.permute import PERMUTATIONS
from mixer_jax.training import losses
from mixer_jax.training.optimizer import DECAY_TYPES, OPTIMIZERS

logger = logging.getLogger(__name__)

Config = Any  # an ml_collections.ConfigDict with the keys of configs/common.py

LOSSES = {
    "softmax": losses.softmax_cross_entropy,
    "sigmoid": losses.sigmoid_cross_entropy,
}


class ConfigError(ValueError):
    """A config that cannot be run, or not in this workdir."""


def check_config(config: Config) -> None:
    """Raises ConfigError if the config's numbers cannot go together."""
    for name, value, choices in (
        ("loss", config.loss, tuple(LOSSES)),
        ("pp.permute", config.pp.permute or "", ("", *PERMUTATIONS)),
        ("optimizer", config.optimizer, OPTIMIZERS),
        ("decay_type", config.decay_type, DECAY_TYPES),
        ("pp.evaluation", config.pp.evaluation, preprocess.EVALUATIONS),
        ("pp.transfer", config.pp.transfer, preprocess.TRANSFERS),
        ("model.dtype", config.model.dtype, (None, "float32", "bfloat16")),
        ("model.remat", config.model.remat, (None, *REMAT_POLICIES)),
    ):
        if value not in choices:
            raise ConfigError(
                f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}."
            )
    if config.pretrained_dir == "None":  # what a flag makes of it
        raise ConfigError("To start from scratch: --config.pretrained_dir=''.")
    crops = [("pp", config.pp.evaluation, config.pp.resize)]
    for name, spec in config.evals.items():
        evaluation = spec.evaluation or config.pp.evaluation
        crops.append((f"evals.{name}", evaluation, spec.resize or config.pp.resize))
    for name, evaluation, size in crops:
        if evaluation != "resize" and size < config.pp.crop:
            raise ConfigError(
                f"{name}.resize is {size}; {evaluation} cuts {config.pp.crop} pixels "
                "(pp.crop) out of it, and needs at least as many."
            )
    if config.sam_rho and not all(factor for _, factor in config.lr_multipliers):
        raise ConfigError(
            "sam_rho and a factor of 0 in lr_multipliers do not go together: the "
            "sharpness of frozen parameters would count."
        )
    for key in ("batch", "batch_eval", "accum_steps", "eval_every",
                "progress_every", "checkpoint_every", "keep_checkpoints"):  # fmt: skip
        if config[key] < 1:
            raise ConfigError(f"{key} is {config[key]}; expected at least 1.")


def check_devices(config: Config, devices: int) -> None:
    """Raises ConfigError if so many devices cannot run the config."""
    if config.mesh.fsdp < 1 or devices % config.mesh.fsdp:
        raise ConfigError(
            f"mesh.fsdp is {config.mesh.fsdp}, which does not divide {devices} devices."
        )
    for key, unit in (
        ("batch", config.accum_steps * devices),
        ("batch_eval", devices),
    ):
        if config[key] % unit:
            accum = f" and accum_steps {config.accum_steps}" if key == "batch" else ""
            fewer = math.gcd(config.accum_steps, config[key] // devices)
            or_fewer = f" Or set accum_steps to {fewer}."
            raise ConfigError(
                f"{key} is {config[key]}; with {devices} devices{accum} it must be a "
                f"multiple of {unit}, such as {-(-config[key] // unit) * unit}."
                f"{or_fewer if config[key] % devices == 0 else ''}"
            )


def in_steps(config: Config, num_examples: int) -> Config:
    """Returns `config` with total_steps and warmup_steps set.

    Each may be given in steps, epochs or examples instead.

    Args:
      config: of the run.
      num_examples: of the training split, an epoch.

    Raises:
      ConfigError: a duration is given twice, or the run has none.
    """
    config = ml_collections.ConfigDict(config)
    for name in ("total", "warmup"):
        images = {"steps": config.batch, "epochs": num_examples, "examples": 1}
        given = {
            f"{name}_{unit}": (config[f"{name}_{unit}"], size)
            for unit, size in images.items()
            if config[f"{name}_{unit}"]
        }
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(f'{k} {v}' for k, (v, _) in given.items())}: give one "
                "of them, and set the others to 0."
            )
        steps = [round(value * size / config.batch) for value, size in given.values()]
        config[f"{name}_steps"] = sum(steps)
    if config.total_steps < 1:
        raise ConfigError("The run has no steps: give total_steps or total_epochs.")
    if config.warmup_steps >= config.total_steps:
        logger.warning(
            "warmup_steps is %d, of %d in all: the learning rate never gets to base_lr",
            config.warmup_steps,
            config.total_steps,
        )
    return config


def for_platform(config: Config, platform: str) -> Config:
    """Returns a copy in which no value of `config.model` is None.

    Args:
      config: see configs/common.py.
      platform: of the devices, such as "tpu".
    """
    config = config.copy_and_resolve_references()
    defaults = {"dtype": "float32", "remat": "none"}
    if platform == "tpu":
        defaults = {"dtype": "bfloat16", "remat": "blocks"}
    for name, value in defaults.items():
        if config.model[name] is None:
            config.model[name] = value
    return config
