"""Models for images of another size than their parameters are for."""

import math
from collections.abc import Mapping
from typing import Any

from mixer_jax.data.sizes import Size, as_size
from mixer_jax.model import MlpMixer
from mixer_jax.run.config import Config, ConfigError
from mixer_jax.variants import count_patches, get_variant
from mixer_jax.weights.layout import CheckpointError, shapes_of_model
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


def count_tiles(config: Config, old_tokens: int) -> int:
    """Returns how many times as many tokens as a file's the images of a run have.

    That is how many times as large block_diagonal makes tokens_mlp_dim: 1, if they are
    not a whole number of times as many.
    """
    new = count_patches(as_size(config.pp.crop), config.model.patches.size)
    tiles, rest = divmod(math.prod(new), old_tokens)
    return 1 if rest else tiles


def check_token_units(config: Config) -> None:
    """Raises ConfigError if a run will make its tokens_mlp_dim larger.

    With block_diagonal that depends on the file of pretrained_dir, which a plan does
    not read. Published files have the units of their variant, for 224 pixels.
    """
    name, units = config.model.model_name, config.model.get("tokens_mlp_dim")
    try:
        variant = get_variant(name)
    except ValueError:
        return  # of a model of one's own nothing is known
    if config.resolution != "block_diagonal" or units != variant.tokens_mlp_dim:
        return
    old = count_patches((224, 224), variant.patches.size)
    tiles = count_tiles(config, math.prod(old))
    if tiles > 1:
        raise ConfigError(
            f"resolution is block_diagonal, and model.tokens_mlp_dim {units}, as in a "
            f"file of {name} for 224 pixels. The run makes it {tiles} times as large "
            "when it reads the file, which a plan does not. Give "
            f"--config.model.tokens_mlp_dim={tiles * units}."
        )
