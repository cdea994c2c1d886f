"""Models for images of another size than their parameters are for."""

import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mixer_jax.data.sizes import Size, as_size
from mixer_jax.model import MlpMixer
from mixer_jax.run.config import Config
from mixer_jax.run.workdir import recorded_config
from mixer_jax.variants import count_patches
from mixer_jax.weights.layout import CheckpointError, shapes_of_model
from mixer_jax.weights.npz import read_shapes
from mixer_jax.weights.published import find_checkpoint
from mixer_jax.weights.resolution import adapt


def adapt_model(
    model: MlpMixer,
    params: Mapping[str, Any],
    sizes: tuple[Size, Size],
    resolution: str,
    where: str,
) -> tuple[MlpMixer, dict[str, Any]]:
    """Returns a model and its parameters for images of another size.

    Args:
      model: any model. For "block_diagonal" its tokens_mlp_dim grows.
      params: its parameters.
      sizes: (height, width) of the images in pixels, as they are and as wanted.
      resolution: see `mixer_jax.weights.resolution.adapt`.
      where: how the message of an error begins: what the parameters are from.

    Raises:
      CheckpointError: the images cannot be cut into whole patches, or the parameters
        not be adapted.
    """
    if min(sizes[1]) < 1:
        raise CheckpointError(f"{where}: there are no images of {sizes[1]} pixels.")
    try:
        grid, new_grid = (count_patches(size, model.patches.size) for size in sizes)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if resolution == "block_diagonal" and hasattr(model, "tokens_mlp_dim"):
        tiles = max(1, math.prod(new_grid) // math.prod(grid))
        model = model.clone(tokens_mlp_dim=tiles * model.tokens_mlp_dim)
    shapes = shapes_of_model(model, (*sizes[1], 3))
    return model, adapt(params, shapes, new_grid, resolution, grid=grid, where=where)


def set_token_units(
    config: Config, workdir: str | os.PathLike[str]
) -> tuple[Config, str]:
    """Returns a config with the tokens_mlp_dim that block_diagonal needs, and a note.

    It is set if it is that of the file of pretrained_dir. Others are the user's choice.
    A run that continues takes the one that it has, and does without the file.

    Args:
      config: see configs/common.py; checked.
      workdir: of the run, which may not be there yet.

    Returns:
      A copy, and a message that says so; or the same config and "".

    Raises:
      OSError: the file of pretrained_dir is not there, or cannot be fetched.
      CheckpointError: it is damaged.
    """
    fields, crop, note = config.model, as_size(config.pp.crop), ""
    if config.resolution != "block_diagonal" or not config.pretrained_dir:
        return config, ""
    recorded = recorded_config(pathlib.Path(workdir).expanduser())
    units, given = recorded.get("model.tokens_mlp_dim"), fields.get("tokens_mlp_dim")
    if not units or not given or units % given:
        path = find_checkpoint(config.pretrained_dir, fields.model_name)
        kernel = read_shapes(path).get("MixerBlock_0/token_mixing/Dense_0/kernel")
        if not kernel or given != kernel[-1]:
            return config, ""
        new_tokens = math.prod(count_patches(crop, fields.patches.size))
        tiles, rest = divmod(new_tokens, kernel[0])
        if tiles == 1 or rest:
            return config, ""
        units = tiles * given
        note = (
            f"model.tokens_mlp_dim is now {units}, not {given}: for pp.crop="
            f"{config.pp.crop}, "
            f"block_diagonal makes it {tiles} times as large"
        )
    config = config.copy_and_resolve_references()
    config.model.tokens_mlp_dim = units
    return config, note
