"""What a model has learned to look for: figures 5, 6 and 7 of the paper."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from einops import rearrange

from mixer_jax.run.loading import LoadedModel
from mixer_jax.variants import count_patches
from mixer_jax.visualize.show import DIVERGING, plain, write_heading
from mixer_jax.visualize.tiles import Tiles, spread
from mixer_jax.weights.layout import CheckpointError, flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

UNITS = "MixerBlock_{}/token_mixing/Dense_0/kernel"  # [tokens, hidden units]
STEM = "stem/kernel"  # [patch height, patch width, 3, channels]


# In inches.
BLOCK_WIDTH = 4.8
PAIR_WIDTH = 1.2


class Pair(NamedTuple):
    """A hidden unit and the one that is closest to its negative.

    Attributes:
      units: their numbers.
      cosine: of the angle between their weights; -1 if one is the other's negative.
      frequency: mean of the two, in cycles per patch; see `mean_frequency`.
    """

    units: tuple[int, int]
    cosine: float
    frequency: float


def draw_weights(
    loaded: LoadedModel,
    *,
    title: str = "",
    blocks: Sequence[int] | None = None,
    num_pairs: int = 32,
    num_filters: int = 64,
) -> "Figure":
    """Draws hidden units of token-mixing MLPs, and filters of the stem.

    A hidden unit of a token-mixing MLP has a weight for each patch of the image (a
    column of `token_mixing/Dense_0/kernel`), and is drawn as a grid of patches. Each
    stands beside its closest inverse: see `pair_units`. The pairs are ordered by
    `mean_frequency`, from low to high, and so are the filters. Of more than there is
    room for, some are drawn, evenly spaced in that order. Each unit and each filter is
    divided by its largest absolute weight.

    Args:
      loaded: the model, as `mixer_jax.run.loading.load_model` gives it.
      title: names the model; default: its `model_name`.
      blocks: whose units to draw; default: the first three.
      num_pairs: units to draw of each block, in pairs; at most.
      num_filters: of the stem to draw, at most.

    Returns:
      The figure. It says so if the model has no token-mixing MLPs, or a stem whose
      filters are no RGB images.

    Raises:
      CheckpointError: `blocks` names a block without a token-mixing MLP; the MLP is not
        for the patches of an image; or the model has nothing to draw.
    """
    from matplotlib.figure import Figure  # over a second to import

    params = flatten(loaded.params)
    patch = loaded.model.patches.size
    height, width = loaded.transform.crop
    grid = count_patches((height, width), patch)
    kernels = _kernels_of_units(params, blocks, grid)
    filters: Any = params.get(STEM)
    if filters is not None and (filters.ndim != 4 or filters.shape[2] != 3):
        filters = None
    if not kernels and filters is None:
        raise CheckpointError(
            f"The model has neither {UNITS.format('*')}, hidden units, nor a {STEM} of "
            "RGB filters: nothing to draw."
        )

    panels = {
        block: spread(pair_units(kernel, grid), num_pairs)
        for block, kernel in kernels.items()
    }
    chosen = [] if filters is None else spread(_by_frequency(filters), num_filters)
    per_row = min(len(panels), 3)
    inches = BLOCK_WIDTH * max(per_row, 2)
    across = round(inches / per_row / PAIR_WIDTH) if panels else 1
    units = Tiles(width / height, 2, across, labels=True)
    num_rows = -(-len(chosen) // round(3 * inches)) or 1
    stem = Tiles(patch[1] / patch[0], 1, -(-len(chosen) // num_rows) or 1, labels=False)
    heights = [0.6, 0.6]  # with headings, and the colour bar
    if panels:
        most = max(map(len, panels.values()))
        one = (inches / per_row - 0.6) * units.ratio(most) + 0.4
        heights[0] = -(-len(panels) // per_row) * one + 1.3
    heights[1] += inches * stem.ratio(len(chosen))
    figure = Figure((inches, sum(heights) + 0.5), layout="constrained")
    name = plain(title or loaded.model.model_name or "a Mixer")
    figure.suptitle(f"Weights of {name}")
    parts: Any = figure.subfigures(2, 1, height_ratios=heights)

    text = f"No hidden units: the blocks have no {UNITS.format('*')}."
    if panels:
        _draw_units(parts[0], units, panels, kernels, grid, per_row)
        text = (
            f"Hidden units of token-mixing MLPs: their weights for the {grid[0]} x "
            f"{grid[1]} patches of an image. Each stands beside its closest inverse; "
            "below are the numbers of the two, and the cosine of the angle between "
            "their weights (-1: exact inverse). From low to high frequency: at the "
            "left the mean frequency of a row's first pair."
        )
        if loaded.transform.permute:
            text += " Patches are where the run's permutation (pp.permute) put them."
    write_heading(parts[0], text, inches)
    text = f"No filters: the model has no {STEM} of RGB patches."
    if chosen:
        images = [[0.5 + 0.5 * scaled(filters[..., n])] for n in chosen]
        stem.draw(parts[1].subplots(), images)
        text = (
            f"Stem: {len(chosen)} of {filters.shape[3]} filters of {patch[0]} x "
            f"{patch[1]} pixels in RGB, from low to high frequency. Grey is 0; each "
            "filter is divided by its largest absolute weight."
        )
    write_heading(parts[1], text, inches)
    return figure


def _draw_units(
    figure: Any,
    tiles: Tiles,
    panels: dict[int, list[Pair]],
    kernels: dict[int, np.ndarray],
    grid: tuple[int, int],
    per_row: int,
) -> None:
    """Draws a panel of pairs of units for each block."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    all_axes = figure.subplots(-(-len(panels) // per_row), per_row, squeeze=False)
    for axes in all_axes.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (block, pairs) in zip(all_axes.flat, panels.items(), strict=False):
        kernel = kernels[block]
        images = [[scaled(kernel[:, n].reshape(grid)) for n in x.units] for x in pairs]
        labels = ["{}, {}: {:.2f}".format(*x.units, x.cosine) for x in pairs]
        tiles.draw(axes, images, labels, cmap=DIVERGING, vmin=-1, vmax=1)
        firsts = range(0, len(pairs), tiles.columns)
        axes.set_yticks(
            [tiles.top(i) + 0.5 for i in firsts],
            [f"{pairs[i].frequency:.2f}" for i in firsts],
        )
        axes.set_ylabel("cycles per patch", size=8)
        count = 2 * len(pairs)
        axes.set_title(f"block {block}: {count} of {kernel.shape[1]} units", size=11)
    figure.colorbar(
        ScalarMappable(Normalize(-1, 1), DIVERGING),
        ax=all_axes,
        location="bottom",
        aspect=50,
        shrink=0.5,
        label="weight / largest absolute weight of the unit",
    )


def mean_frequency(images: np.ndarray) -> np.ndarray:
    """Returns how fine the structure of images is: 0 if constant.

    That is the mean spatial frequency of the two-dimensional discrete Fourier
    transform, weighted with its power. The constant part counts, with frequency 0.

    Args:
      images: [..., height, width].

    Returns:
      [...] in cycles per pixel (of a grid of patches: per patch), at most sqrt(1/2).
    """
    height, width = images.shape[-2:]
    radius = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width))
    power = np.abs(np.fft.fft2(images)) ** 2
    total = power.sum((-2, -1))
    return (power * radius).sum((-2, -1)) / np.where(total == 0, 1, total)


def pair_units(kernel: np.ndarray, grid: tuple[int, int]) -> list[Pair]:
    """Pairs each hidden unit of a token-mixing MLP with its closest inverse.

    The two units whose weights have the lowest cosine are the first pair. The same
    holds for the next one among the units that are left, and so on. So each unit is in
    one pair; of an odd number one is left out.

    Args:
      kernel: [tokens, units].
      grid: of the tokens, (down, across).

    Returns:
      The pairs, from low to high frequency. The first unit of each is the one with more
      positive weight.
    """
    norms = np.linalg.norm(kernel, axis=0)
    directions = kernel / np.where(norms == 0, 1, norms)
    first, second = np.triu_indices(kernel.shape[1], 1)
    cosines = (directions.T @ directions)[first, second]
    frequencies = mean_frequency(rearrange(kernel, "(h w) n -> n h w", h=grid[0]))
    used = np.zeros(kernel.shape[1], bool)
    pairs = []
    for i in np.argsort(cosines, kind="stable"):
        a, b = int(first[i]), int(second[i])
        if used[a] or used[b]:
            continue
        used[[a, b]] = True
        if kernel[:, a].sum() < kernel[:, b].sum():
            a, b = b, a
        frequency = float(frequencies[[a, b]].mean())
        pairs.append(Pair((a, b), float(cosines[i]), frequency))
    return sorted(pairs, key=lambda pair: pair.frequency)


def _kernels_of_units(
    params: dict[str, Any], blocks: Sequence[int] | None, grid: tuple[int, int]
) -> dict[int, np.ndarray]:
    """Returns the kernels [tokens, units] of the chosen blocks, by block."""
    asked = range(3) if blocks is None else blocks
    kernels = {}
    for block in asked:
        key = UNITS.format(block)
        if key in params:
            kernels[block] = np.asarray(params[key], np.float32)
        elif blocks is not None:
            raise CheckpointError(
                f"There is no {key}: the model has no block {block}, or the block has "
                "no token-mixing MLP of this name."
            )
    for block, kernel in kernels.items():
        if kernel.shape[0] != grid[0] * grid[1]:
            raise CheckpointError(
                f"{UNITS.format(block)} is for {kernel.shape[0]} tokens, but the "
                f"images have {grid[0]} x {grid[1]} patches."
            )
    return kernels


def _by_frequency(filters: np.ndarray) -> list[int]:
    """Orders filters [height, width, 3, n] by the mean frequency of their colours."""
    images = rearrange(np.asarray(filters, np.float32), "h w c n -> n c h w")
    power = (images**2).sum((2, 3))
    weights = power / np.maximum(power.sum(1, keepdims=True), 1e-30)
    return np.argsort((mean_frequency(images) * weights).sum(1)).tolist()


def scaled(weights: np.ndarray) -> np.ndarray:
    """Divides by the largest absolute value."""
    return weights / (np.abs(weights).max() or 1)
