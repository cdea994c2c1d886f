"""A config, checked before anything is opened, and read in steps and for devices."""

import difflib
import logging
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import ml_collections

from mixer_jax.data.preprocess import HALF, Color, as_color
from mixer_jax.data.sizes import MOST_RESIZED, as_size, fits_crop, size_text
from mixer_jax.run.keys import KEYS, row_of, values_of

logger = logging.getLogger(__name__)

Config = Any  # an ml_collections.ConfigDict with the keys of configs/common.py


class ConfigError(ValueError):
    """A config that cannot be run, or not in this workdir."""


def check_config(config: Config) -> None:
    """Raises ConfigError with a list of all faults of a config.

    These are keys that are missing or unknown, and values that are not in KEYS. Only if
    there are none, values that cannot go together are looked for.
    """
    values = flatten(config.to_dict())
    problems = [*_missing_or_unknown(config, values)]
    for key, value in values.items():
        allowed = values_of(key)
        if allowed and not allowed.include(value):
            problems.append(f"{key} is {value!r}; expected {allowed.expected}.")
    if problems := problems or [*_contradictions(config)]:
        raise ConfigError("\n".join(problems))


def _missing_or_unknown(config: Config, values: Iterable[str]) -> Iterator[str]:
    for key in values:
        if not key.startswith("model.") and row_of(key) not in KEYS:
            close = difflib.get_close_matches(key, KEYS, 1)
            yield (
                f"The config has a key {key}, which mixer_jax/run/keys.py does not "
                "list."
                + (f" Did you mean {close[0]}?" if close else "")
                + " A new key gets a row there."
            )
    # A fork may do without a field of the model.
    needed = [key for key in KEYS if not key.startswith(("model.", "evals."))]
    for key in [*needed, "model", "evals"]:
        if key not in values and key not in config:
            yield f"The config has no {key}. Make it with configs/common.py."
    for name in config.get("evals", {}):
        for key in KEYS:
            prefix, _, last = key.rpartition(".")
            if prefix == "evals.*" and f"evals.{name}.{last}" not in values:
                yield f"evals.{name} has no {last}. Add it with add_evaluator."


def _contradictions(config: Config) -> Iterator[str]:
    crop, patches = as_size(config.pp.crop), config.model.get("patches")
    if patches and any(a % b for a, b in zip(crop, patches.size, strict=True)):
        units = list(patches.size)
        if isinstance(config.pp.crop, int):  # for both sides
            units = 2 * [math.lcm(*units)]
        near = [max(a // b, 1) * b for a, b in zip(crop, units, strict=True)]
        yield (
            f"pp.crop is {config.pp.crop}: {size_text(crop)} pixels cannot be cut into "
            f"patches of {size_text(patches.size)} (model.patches.size). Take "
            + (
                f"a multiple of {units[0]}, such as {near[0]}."
                if isinstance(config.pp.crop, int)
                else f"multiples of these, such as ({near[0]},{near[1]})."
            )
        )
    crops = {"pp": config.pp}
    crops |= {f"evals.{name}": spec for name, spec in evals(config).items()}
    for name, spec in crops.items():
        if spec.evaluation != "resize" and not fits_crop(spec.resize, crop):
            yield (
                f"{name}.resize is {spec.resize}; {spec.evaluation} cuts "
                f"{size_text(crop)} pixels (pp.crop) out of it, and needs at least as "
                f"many each way, and at most {MOST_RESIZED}."
            )
    if config.init_from and config.pretrained_dir:
        yield (
            f"init_from is {config.init_from} and pretrained_dir "
            f"{config.pretrained_dir}: a run starts from one of them. To start from "
            "the run: --config.pretrained_dir=''"
        )
    if config.resolution != "error" and not config.pretrained_dir:
        yield (
            f"resolution is {config.resolution}, and pretrained_dir is empty: only the "
            "parameters of its file are adapted. Name one, or set resolution to error."
        )
    for name in sorted({"train", "test"} & set(config.evals)):
        yield f"evals.{name} needs another name: {name}/… are numbers of the run."
    if config.sam_rho and not all(factor for _, factor in config.lr_multipliers):
        yield (
            "sam_rho and a factor of 0 in lr_multipliers do not go together: the "
            "sharpness of frozen parameters would count."
        )
    for name in ("total", "warmup"):
        given = _durations(config, name)
        if len(given) > 1:
            listed = " and ".join(f"{key} {value}" for key, value in given.items())
            yield f"{listed}: give one of them, and set the others to 0."
    if not _durations(config, "total"):
        yield "The run has no steps: give total_steps, total_epochs or total_examples."


def check_devices(config: Config, devices: int) -> None:
    """Raises ConfigError if so many devices cannot run the config."""
    if devices % config.mesh.fsdp:
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


def evals(config: Config) -> dict[str, Config]:
    """Returns the values of each evaluator that config.evals adds, by name.

    Where they are None or 0, those of the run take their place.
    """
    defaults = {
        "dataset": config.dataset,
        "evaluation": config.pp.evaluation,
        "resize": config.pp.resize,
        "every": config.eval_every,
    }
    specs = {}
    for name, spec in config.evals.items():
        specs[name] = spec.copy_and_resolve_references()
        if not spec.dataset:
            specs[name].label_key = spec.label_key or config.label_key
        with specs[name].ignore_type():  # one number, or two
            for key, value in defaults.items():
                specs[name][key] = spec[key] or value
    return specs


def in_steps(config: Config, num_examples: int) -> Config:
    """Returns a copy of `config` with total_steps and warmup_steps set.

    Each may be given in steps, epochs or examples instead.

    Args:
      config: of the run, checked.
      num_examples: of the training split, an epoch.

    Raises:
      ConfigError: the run has no steps.
    """
    config = ml_collections.ConfigDict(config)
    sizes = {"steps": config.batch, "epochs": num_examples, "examples": 1}
    for name in ("total", "warmup"):
        examples = sum(
            value * sizes[key.removeprefix(f"{name}_")]
            for key, value in _durations(config, name).items()
        )
        config[f"{name}_steps"] = round(examples / config.batch)
    if config.total_steps < 1:
        raise ConfigError(
            f"The run has no steps: {num_examples} examples in batches of "
            f"{config.batch} make less than one. Give more total_epochs or "
            "total_examples, or total_steps."
        )
    if config.warmup_steps >= config.total_steps:
        logger.warning(
            "warmup_steps is %d, of %d steps: the learning rate never reaches base_lr",
            config.warmup_steps,
            config.total_steps,
        )
    return config


def _durations(config: Config, name: str) -> dict[str, float]:
    """Returns those keys <name>_{steps,epochs,examples} that are not 0."""
    keys = [f"{name}_{unit}" for unit in ("steps", "epochs", "examples")]
    return {key: config[key] for key in keys if config[key]}


def for_platform(config: Config, platform: str) -> Config:
    """Returns a copy with the dtype and remat of the model that suit the devices.

    Args:
      config: see configs/common.py.
      platform: of the devices, such as "tpu".
    """
    config = config.copy_and_resolve_references()
    dtype = "bfloat16" if platform == "tpu" else "float32"
    for name, value in {"dtype": dtype, "remat": "none"}.items():
        if name in config.model and config.model[name] is None:
            config.model[name] = value
    return config


def normalization(config: Config) -> tuple[Color, Color]:
    """Returns the mean and the standard deviation of a run's images.

    Both are of red, green and blue in units of [0, 1]; see
    `mixer_jax.data.preprocess.scale`.
    """
    mean, std = (
        HALF if x is None else as_color(x) for x in (config.pp.mean, config.pp.std)
    )
    return mean, std


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values of nested dicts by keys such as "pp.crop"."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
