"""Settings of a run that the parameters it starts from bring with them."""

import logging
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from mixer_jax.data.preprocess import as_color
from mixer_jax.run.config import Config, flatten
from mixer_jax.run.model import FIELD_DEFAULTS
from mixer_jax.run.paths import absolute_folder
from mixer_jax.run.resolution import count_tiles
from mixer_jax.run.source import open_run, open_source
from mixer_jax.run.workdir import ADDED_KEYS, recorded_config, workdir_path
from mixer_jax.weights.published import without_secrets
from mixer_jax.weights.reading import WeightsSource, find_checkpoint

# The keys of a config whose None stands for what the file says, or else the default.
_DEFAULTS: dict[str, Any] = {
    key: {**FIELD_DEFAULTS, **ADDED_KEYS}[key]
    for key in ("model.gelu", "model.layer_norm_epsilon", "pp.mean", "pp.std")
    if key in FIELD_DEFAULTS or key in ADDED_KEYS  # a fork may lack a field
}


class Note(NamedTuple):
    """What is to be logged, once there is a log."""

    level: int
    text: str


def settings_of_source(
    config: Config, workdir: str | os.PathLike[str]
) -> tuple[Config, list[Note]]:
    """Returns a config with what is known of the parameters that its run starts from.

    These are GELU, LayerNorm epsilon, mean and standard deviation where the config has
    None, and the tokens_mlp_dim that block_diagonal needs, if the config has that of
    the file. Other values are the user's choice; one that contradicts the file is
    warned of. A run that continues takes what it has, and does without the file.

    Args:
      config: see configs/common.py; checked.
      workdir: of the run, which may not be there yet.

    Returns:
      A copy, and what it changes.

    Raises:
      ConfigError: the workdir cannot be one: see `workdir_path`.
      OSError: what pretrained_dir or init_from names is not there, or cannot be
        fetched.
      CheckpointError: it is damaged.
    """
    recorded = recorded_config(workdir_path(workdir))
    source, where = None, config.init_from
    if not recorded and where:
        source = open_run(pathlib.Path(absolute_folder(where)))
    elif not recorded and config.pretrained_dir:
        name = find_checkpoint(config.pretrained_dir, config.model.model_name)
        source, where = open_source(name), without_secrets(name)
    said = _said_by(source) if source else recorded
    given = flatten(config.to_dict())
    changes: dict[str, Any] = {}
    taken, notes = [], []
    for key, default in _DEFAULTS.items():
        if key not in given:
            continue
        value = said.get(key, default)
        if given[key] is None:
            changes[key] = value
            if source and not _same(value, default):
                taken.append(f"{key}={value}")
        elif source and key in said and not _same(given[key], value):
            text = f"{key} is {given[key]}, but {where} was trained with {value}"
            notes.append(Note(logging.WARNING, text))
    if taken:
        notes.append(Note(logging.INFO, f"taken    from {where}: {', '.join(taken)}"))
    units, note = _token_units(config, recorded, source)
    if units:
        changes["model.tokens_mlp_dim"] = units
    if note:
        notes.append(Note(logging.INFO, note))
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    return config, notes


def _said_by(source: WeightsSource) -> dict[str, Any]:
    """Returns the values of keys of a config that a source says."""
    about = source.about
    colors = {
        f"pp.{name}": _shortest(about.transform[name])
        for name in ("mean", "std")
        if name in about.transform
    }
    return {f"model.{name}": value for name, value in about.fields.items()} | colors


def _shortest(color: Any) -> Any:
    """Returns one number for three that are equal, as people write it."""
    color = as_color(color)
    return color[0] if len(set(color)) == 1 else color


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, str) or isinstance(other, str):
        return bool(one == other)
    return as_color(one) == as_color(other)


def _token_units(
    config: Config, recorded: Mapping[str, Any], source: WeightsSource | None
) -> tuple[int | None, str]:
    """Returns the tokens_mlp_dim that block_diagonal needs, and a note that it is new.

    None if it stays as it is.
    """
    given = config.model.get("tokens_mlp_dim")
    if config.resolution != "block_diagonal" or not given:
        return None, ""
    if source is None:
        units = recorded.get("model.tokens_mlp_dim", given)
        return (None if units % given else units), ""
    kernel = source.shapes().get("MixerBlock_0/token_mixing/Dense_0/kernel")
    if not kernel or given != kernel[-1]:
        return None, ""
    tiles = count_tiles(config, kernel[0])
    if tiles == 1:
        return None, ""
    units = tiles * given
    return units, (
        f"adapted  model.tokens_mlp_dim is now {units}, not {given}: for pp.crop="
        f"{config.pp.crop}, block_diagonal makes it {tiles} times as large"
    )
