"""What tokens draw from which others, and which images activate hidden units most."""

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mixer_jax.run.loading import LoadedModel
from mixer_jax.variants import count_patches
from mixer_jax.visualize.activations import Activations, unit_activations
from mixer_jax.visualize.influence import NUM_PROBES, capture_block, token_influence
from mixer_jax.visualize.show import (
    DIVERGING,
    SEQUENTIAL,
    displayable,
    plain,
    write_heading,
)
from mixer_jax.visualize.weights import UNITS, scaled
from mixer_jax.weights.layout import CheckpointError, flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LETTERS = "ABCDEFGH"  # of the output tokens, and so the most that are drawn
TOP_IMAGES = 7
PANEL_WIDTH, UNIT_HEIGHT = 2.7, 1.5  # inches


def draw_mixing(
    loaded: LoadedModel,
    image: np.ndarray,
    *,
    title: str = "",
    block: int = 0,
    tokens: Sequence[tuple[int, int]] | None = None,
    units: Sequence[int] | None = None,
    images: Iterable[np.ndarray] | None = None,
) -> "Figure":
    """Draws what tokens of an image draw from which others, at one block of a model.

    For each of the chosen output tokens there is a map of the input tokens; see
    `token_influence`. That works for any model whose blocks are called MixerBlock_<i>.

    If the block has a token-mixing MLP, and there are images to compare with, below are
    hidden units of it, each with its weights and the images that activate it most; see
    `unit_activations`.

    Args:
      loaded: the model, as `mixer_jax.run.loading.load_model` gives it.
      image: uint8 [height, width, 3] of any size; the model's transform is applied.
      title: names the model and the image; default: the model's `model_name`.
      block: its number.
      tokens: (row, column) of the output tokens; default: four amid the quarters.
      units: hidden units to show; default: the four that this image activates most,
        compared with the other images (in standard deviations above their mean).
      images: uint8 [height, width, 3] each, to find those that activate units most.

    Returns:
      The figure. It says why, where the lower part is not there.

    Raises:
      CheckpointError: the model has no such block.
      ValueError: there is no such token or unit, or there are no images.
    """
    from matplotlib.figure import Figure  # over a second to import

    seen = loaded.transform(image)
    height, width = count_patches(seen.shape[:2], loaded.model.patches.size)
    if tokens is None:
        tokens = list(
            itertools.product(
                sorted({height // 4, 3 * height // 4}),
                sorted({width // 4, 3 * width // 4}),
            )
        )
    if not 1 <= len(tokens) <= len(LETTERS):
        raise ValueError(
            f"{len(tokens)} output tokens; there is room for 1 to {len(LETTERS)}."
        )
    for row, column in tokens:
        if not (0 <= row < height and 0 <= column < width):
            raise ValueError(
                f"There is no token in row {row}, column {column}: the image has "
                f"{height} x {width}, counted from 0."
            )
    captured = capture_block(loaded, seen, block)
    if len(captured.inputs) != height * width:
        raise CheckpointError(
            f"MixerBlock_{block} has {len(captured.inputs)} tokens, but the image has "
            f"{height} x {width} patches."
        )
    numbers = [row * width + column for row, column in tokens]
    maps = token_influence(captured, numbers).reshape(-1, height, width)
    activations, missing = None, ""
    chosen = " that the image activates most, compared with others" * (units is None)
    key = UNITS.format(block)
    if key not in flatten(loaded.params):
        missing = f"The block has no {key}, and so no hidden units to show."
    elif images is None:
        missing = (
            "No images to compare with, and so no hidden units with the images that "
            "activate them most."
        )
    else:
        activations = unit_activations(loaded, seen, block, images)
        units = _choose_units(activations, units)

    num_channels = captured.inputs.shape[-1]
    lower = 0.4 if activations is None else UNIT_HEIGHT * len(units or ()) + 1.5
    figure_width = PANEL_WIDTH * max(1 + len(tokens), 5)
    upper = PANEL_WIDTH * seen.shape[0] / seen.shape[1] + 1.7
    figure = Figure((figure_width, upper + lower + 0.4), layout="constrained")
    name = plain(title or loaded.model.model_name or "a Mixer")
    figure.suptitle(f"{name}: what block {block} mixes")
    parts: Any = figure.subfigures(2, 1, height_ratios=(upper, lower))
    _draw_maps(parts[0], displayable(seen, loaded.transform), tokens, maps)
    text = (
        f"What each output token, A to {LETTERS[len(tokens) - 1]}, draws from the "
        "input tokens. 1: as much as from a token that is handed on as it is."
    )
    if num_channels > NUM_PROBES:
        text += f" Estimated from {NUM_PROBES} random directions of {num_channels}."
    write_heading(parts[0], text, figure_width)
    if activations is None or units is None:
        write_heading(parts[1], missing, figure_width)
        return figure
    kernel = np.asarray(flatten(loaded.params)[key], np.float32)
    grids = {n: kernel[:, n].reshape(height, width) for n in units}
    _draw_units(parts[1], activations, grids)
    text = (
        f"Hidden units of its token-mixing MLP{chosen}: their weights for the "
        f"patches, and which of {len(activations.images):,} images activate them most. "
        "The numbers are activations: the highest of all channels, before the GELU."
    )
    write_heading(parts[1], text, figure_width)
    return figure


def _choose_units(
    activations: Activations, units: Sequence[int] | None
) -> Sequence[int]:
    if units is None:
        mean, deviation = (f(activations.of_images, 0) for f in (np.mean, np.std))
        surplus = (activations.of_image - mean) / np.maximum(deviation, 1e-6)
        return np.argsort(-surplus, kind="stable")[:4].tolist()
    count = len(activations.of_image)
    for n in units:
        if not 0 <= n < count:
            raise ValueError(
                f"There is no hidden unit {n}: there are 0 to {count - 1}."
            )
    return units


def _draw_maps(
    figure: Any,
    image: np.ndarray,
    tokens: Sequence[tuple[int, int]],
    maps: np.ndarray,
) -> None:
    """Draws an image with marked tokens, and for each a map of what it draws from."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    height, width = maps[0].shape
    without_itself = [x.copy() for x in maps]
    for shown, token in zip(without_itself, tokens, strict=True):
        shown[token] = np.nan
    highest = max(np.nanmax(x, initial=0) for x in without_itself) or 1
    scale = Normalize(0, highest)
    colors = colormaps[SEQUENTIAL].with_extremes(bad="lightgray")
    panels = figure.subplots(1, 1 + len(maps))
    panels[0].set_title("the image as the model sees it,\nand output tokens", size=10)
    drawn: list[Any] = [(panels[0], image, {})]
    drawn += [
        (x, y, {"cmap": colors, "norm": scale})
        for x, y in zip(panels[1:], without_itself, strict=True)
    ]
    for axes, values, show in drawn:
        extent = (0, width, height, 0)  # so that a token is a square of side 1
        axes.imshow(
            values, extent=extent, aspect="auto", interpolation="nearest", **show
        )
        axes.set(xticks=[], yticks=[], box_aspect=image.shape[0] / image.shape[1])
    outline = [withStroke(linewidth=2.5, foreground="black")]
    for i, (row, column) in enumerate(tokens):
        letter = LETTERS[i]
        axes, own = panels[1 + i], maps[i][row, column]
        center = {"x": column + 0.5, "y": row + 0.5, "ha": "center", "va": "center"}
        panels[0].text(
            s=letter, color="white", weight="bold", path_effects=outline, **center
        )
        axes.text(s=letter, weight="bold", **center)
        for x in (panels[0], axes):
            for color, line in (("black", 2.5), ("white", 1)):
                frame = Rectangle((column, row), 1, 1, fill=False)
                frame.set(edgecolor=color, linewidth=line)
                x.add_patch(frame)
        axes.set_title(
            f"{letter}: row {row}, column {column}\nfrom itself: {own:.2f}", size=10
        )
    figure.colorbar(
        ScalarMappable(scale, SEQUENTIAL),
        ax=list(panels),
        location="bottom",
        aspect=60,
        shrink=0.7,
        label="Frobenius norm of d output token / d input token, over √channels",
    )


def _draw_units(
    figure: Any, activations: Activations, grids: dict[int, np.ndarray]
) -> None:
    """Draws units in rows: the weights, then the images that activate it most."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    rows = figure.subplots(len(grids), 1 + TOP_IMAGES, squeeze=False)
    for axes in rows.flat:
        axes.set_axis_off()
    for row, (n, grid) in zip(rows, grids.items(), strict=True):
        row[0].imshow(
            scaled(grid),
            cmap=DIVERGING,
            vmin=-1,
            vmax=1,
            aspect="auto",
            interpolation="nearest",
        )
        image_height, image_width = activations.images.shape[1:3]
        row[0].set_box_aspect(image_height / image_width)
        own = activations.of_image[n]
        row[0].set_title(f"unit {n}: this image {own:.2f}", size=9)
        best = np.argsort(-activations.of_images[:, n], kind="stable")
        for axes, i in zip(row[1:], best, strict=False):
            axes.imshow(activations.images[i], interpolation="nearest")
            axes.set_title(f"{activations.of_images[i, n]:.2f}", size=9)
    figure.colorbar(
        ScalarMappable(Normalize(-1, 1), DIVERGING),
        ax=rows[:, 0],
        location="bottom",
        ticks=(-1, 0, 1),
        label="weight / largest\nabsolute weight",
    )
