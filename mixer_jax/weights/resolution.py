"""Parameters for images or patches of another size.

A Mixer's token mixing is made for one number of tokens. There are two ways to make it
fit another one:

- "block_diagonal", the paper's (appendix C), for images K times as high and wide. The
  new model sees the image as K x K tiles, and at first computes for each tile just what
  the old one does. It has K² times the hidden units in token mixing.
- "interpolate", for any size. The hidden units stay. They see the tokens resized to the
  old grid of patches, and what they add is resized to the new grid.

The stem is resized for patches of another size, as in FlexiViT.
"""

import logging
import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from mixer_jax.weights import layout, names

logger = logging.getLogger(__name__)

# What the axes of the published parameters stand for, if that depends on the image.
_AXES = {
    "token_mixing/Dense_0/kernel": ("tokens", "units"),
    "token_mixing/Dense_0/bias": ("units",),
    "token_mixing/Dense_1/kernel": ("units", "tokens"),
    "token_mixing/Dense_1/bias": ("tokens",),
}

_TOKENS_BIAS = "token_mixing/Dense_1/bias"  # one entry for each token

# What each way changes, for an error about the rest.
_CHANGES = {
    "block_diagonal": "It makes tokens and hidden units of token mixing {tiles} times "
    "as many: the model's tokens_mlp_dim must be {tiles} times the old one.",
    "interpolate": "It changes the number of tokens only: tokens_mlp_dim stays.",
}

Grid = tuple[int, int]  # patches down and across


def adapt(
    params: Mapping[str, Any],
    shapes: layout.Shapes,
    new_grid: Grid,
    resolution: str,
    *,
    grid: Grid | None = None,
    where: str = "The parameters",
) -> dict[str, Any]:
    """Returns parameters of one size of images for a model of another.

    A fork's own parameters are adapted too, if their axes tell how: an axis with one
    entry for each token is one, and of a kernel the last axis but one is its input.

    Args:
      params: a nested dict of numpy or JAX arrays.
      shapes: of the new model's parameters, flat. A parameter that is not among them
        stays as it is, and so does the head.
      new_grid: patches (down, across) of the new model's images.
      resolution: "block_diagonal" or "interpolate".
      grid: patches (down, across) of the images that `params` are for. Default: as
        many down as across, if their number allows that.
      where: how the message of an error begins: the file that `params` are from.

    Returns:
      The tree of `params`. Arrays that change are new numpy arrays; the others are the
      ones given. A log line says what was done.

    Raises:
      ValueError: there is no such `resolution`.
      CheckpointError: there is no such way between the two grids, or from the shapes of
        some parameters to the new model's. Every key at fault is named.
    """
    if resolution not in METHODS:
        raise ValueError(
            f"resolution is {resolution!r}, expected {' or '.join(METHODS)}."
        )
    flat = layout.flatten(params)
    found = {
        key: tuple(x.shape)
        for key, x in flat.items()
        if key in shapes and not names.is_head(key)
    }
    new_tokens = math.prod(new_grid)
    old_tokens = _count_tokens(found, shapes, new_tokens)
    grid = grid or _square(old_tokens, new_grid, where)
    if math.prod(grid) != old_tokens:
        raise layout.CheckpointError(
            f"{where}: for {old_tokens} tokens, but grid is {grid}."
        )
    sizes = "{}x{} patches to {}x{}".format(*grid, *new_grid)
    if resolution == "block_diagonal" and (
        new_grid[0] % grid[0] or new_grid[1] % grid[1]
    ):
        raise layout.CheckpointError(
            f"{where}: no block_diagonal from {sizes}. Height and width must be whole "
            "multiples of the old ones. For other sizes there is interpolate."
        )
    tiles = new_tokens // old_tokens
    adapted = dict(flat)
    for key in found:
        axes = _axes_of(key, found[key], shapes[key], old_tokens, new_tokens)
        if key == "stem/kernel" and len(found[key]) == 4:
            adapted[key] = _resize_stem(flat[key], shapes[key][:2])
        elif grid != new_grid and ("tokens" in axes or found[key] != shapes[key]):
            is_kernel = key.endswith("kernel")
            adapted[key] = METHODS[resolution](
                np.asarray(flat[key]), axes, is_kernel, grid, new_grid
            )
    layout.check_shapes(
        {key: tuple(adapted[key].shape) for key in found},
        {key: shapes[key] for key in found},
        f"{where}: {resolution} from {sizes} cannot make the model's parameters. "
        + _CHANGES[resolution].format(tiles=tiles),
    )
    stem = found.get("stem/kernel"), shapes.get("stem/kernel")
    if grid != new_grid:
        units = "" if resolution == "interpolate" else f", {tiles} x tokens_mlp_dim"
        logger.info("adapted  %s by %s from %s%s", where, resolution, sizes, units)
    if stem[0] != stem[1]:
        logger.info("adapted  %s: its stem from %s to %s", where, *stem)
    return layout.unflatten(adapted)


def explain(found: layout.MixerSizes, wanted: layout.MixerSizes) -> str:
    """Returns what each choice does for a file and a model, and what it costs."""
    ratio, units = wanted.num_tokens / found.num_tokens, found.variant.tokens_mlp_dim
    cost = "Token mixing has {:.3g} times the parameters and work."
    needs = "Not possible here."
    if ratio == int(ratio):
        needs = f"It needs tokens_mlp_dim={int(units * ratio)}. {cost.format(ratio**2)}"
    return f"""
Choices for images or patches of another size (in a run, --config.resolution=...):
  resolution='interpolate': for any size. Outputs change: fine-tune.
    It keeps tokens_mlp_dim={units}. {cost.format(ratio)}
  resolution='block_diagonal': for whole multiples of height and width. Outputs are at
    first those of each tile. {needs}
What does not fit:"""


def _block_diagonal(
    x: np.ndarray, axes: tuple[str, ...], is_kernel: bool, grid: Grid, new_grid: Grid
) -> np.ndarray:
    """Returns a parameter for a grid of tiles, each of which is an old grid.

    A kernel becomes block diagonal, with a copy of the old one for each tile. Anything
    else is repeated for each tile. Tokens are brought from the order of tiles, in which
    that is so, to the model's: row by row of the whole grid.
    """
    (h, w), (new_h, new_w) = grid, new_grid
    tile_grid = {"kh": new_h // h, "kw": new_w // w}
    tiles = math.prod(tile_grid.values())
    changing = [i - x.ndim for i, axis in enumerate(axes) if axis]
    if is_kernel and changing == [-2, -1]:
        rows, columns = x.shape[-2:]
        blocks = np.zeros((*x.shape[:-2], tiles, rows, tiles, columns), x.dtype)
        for tile in range(tiles):
            blocks[..., tile, :, tile, :] = x
        x = rearrange(blocks, "... k row l column -> ... (k row) (l column)")
    elif len(changing) == 1 and not (is_kernel and changing == [-2]):
        x = np.concatenate(tiles * [x], changing[0])
    else:
        return x  # its shape is an error
    order = np.arange(tiles * h * w)
    order = rearrange(order, "(kh kw h w) -> (kh h kw w)", h=h, w=w, **tile_grid)
    for i in changing:
        if axes[i] == "tokens":
            x = x.take(order, i)
    return x


def _interpolate(
    x: np.ndarray, axes: tuple[str, ...], is_kernel: bool, grid: Grid, new_grid: Grid
) -> np.ndarray:
    """Returns a parameter for another grid: its tokens are resampled bilinearly.

    The input axis of a kernel gets the transpose of the resize from the new grid to the
    old one. So the sum over that axis stays, and with it what a constant gives.
    """
    dtype = x.dtype
    for i, axis in enumerate(axes):
        if axis == "tokens":
            sizes = list(zip(grid, new_grid, strict=True))
            matrices = [_resize_matrix(old, new) for old, new in sizes]
            if is_kernel and i == x.ndim - 2:
                matrices = [_resize_matrix(new, old).T for old, new in sizes]
            x = np.moveaxis(x, i, -1)
            x = rearrange(x, "... (h w) -> ... h w", h=grid[0])
            x = np.einsum("...hw,yh,xw->...yx", x, *matrices, optimize=True)
            x = np.moveaxis(rearrange(x, "... h w -> ... (h w)"), -1, i)
    return np.ascontiguousarray(x, dtype)


METHODS = {"block_diagonal": _block_diagonal, "interpolate": _interpolate}

# What to do with parameters for images of another size.
RESOLUTIONS = ("error", *METHODS)


def _resize_stem(kernel: Any, size: tuple[int, ...]) -> Any:
    """Returns the stem's kernel for patches of another size (FlexiViT, section 3.4).

    With B the bilinear resize of a patch, it is the pseudo-inverse of Bᵀ times the old
    kernel. A patch enlarged by B then gives the token that it gave before.

    Args:
      kernel: [height, width, channels of the image, channels of a token].
      size: new (height, width) in pixels.
    """
    if kernel.shape[:2] == size:
        return kernel
    # B resizes rows and columns one after the other, and so does its pseudo-inverse.
    inverses = [
        np.linalg.pinv(_resize_matrix(old, new, antialias=False).T)
        for old, new in zip(kernel.shape[:2], size, strict=True)
    ]
    resized = np.einsum(
        "hwio,yh,xw->yxio", np.asarray(kernel), *inverses, optimize=True
    )
    return resized.astype(kernel.dtype)


def _resize_matrix(old: int, new: int, antialias: bool = True) -> np.ndarray:
    """Returns the weights [new, old] of a bilinear resize along one axis.

    Args:
      old: length before.
      new: length after.
      antialias: make the filter wider when shrinking, so that every entry counts.
    """
    step = old / new
    centres = (np.arange(new) + 0.5) * step - 0.5
    distance = np.abs(centres[:, None] - np.arange(old))
    weights = np.maximum(1 - distance / (max(step, 1) if antialias else 1), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _axes_of(
    key: str,
    found: tuple[int, ...],
    expected: tuple[int, ...],
    old_tokens: int,
    new_tokens: int,
) -> tuple[str, ...]:
    """Says for each axis of a parameter whether it is of tokens, or grows as they do.

    Of the published parameters that is known. Of others sizes tell.
    """
    known = _AXES.get(key.partition("/")[2], ())
    if known and len(found) >= len(known):
        return (len(found) - len(known)) * ("",) + known  # blocks may be stacked
    if names.is_published(key) or len(found) != len(expected):
        return len(found) * ("",)
    kinds = {(old_tokens, new_tokens): "tokens"}
    return tuple(
        kinds.get((old, new), "units" if old != new else "")
        for old, new in zip(found, expected, strict=True)
    )


def _count_tokens(
    found: layout.Shapes, expected: layout.Shapes, new_tokens: int
) -> int:
    """Returns the number of tokens that parameters are for."""
    biases = [x for key, x in found.items() if key.endswith(_TOKENS_BIAS)]
    published = [x[-1] for x in biases if x]
    others = [
        old
        for key, shape in found.items()
        if not names.is_published(key)
        for old, new in zip(shape, expected[key], strict=False)
        if old != new == new_tokens
    ]
    return next(iter(published + others), new_tokens)


def _square(tokens: int, new_grid: Grid, where: str) -> Grid:
    side = math.isqrt(tokens)
    if side * side == tokens:
        return side, side
    if tokens == math.prod(new_grid):
        return new_grid
    raise layout.CheckpointError(
        f"{where}: for {tokens} tokens, which are no square grid of patches. Give the "
        "grid to mixer_jax.weights.resolution.adapt."
    )
