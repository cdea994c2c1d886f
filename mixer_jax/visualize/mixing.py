"""What tokens draw from which others, and which images activate hidden units most."""

import itertools
import string
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mixer_jax.run.loading import LoadedModel
from mixer_jax.training.step import to_model_input
from mixer_jax.variants import count_patches
from mixer_jax.visualize.show import DIVERGING, SEQUENTIAL, displayable, plain
from mixer_jax.visualize.weights import HEADING, UNITS, scaled
from mixer_jax.weights.layout import CheckpointError, flatten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUM_PROBES = 64
BATCH = 16  # images, or probes, at a time
TOP_IMAGES = 7
UNIT_HEIGHT = 1.6  # inches


class Block(NamedTuple):
    """A block as a function, and what it gets of an image.

    Attributes:
      function: maps (variables, [tokens, channels]) to [tokens, channels].
      variables: parameters, and what else the module has.
      inputs: [tokens, channels].
    """

    function: Callable[[Any, jax.Array], jax.Array]
    variables: Any
    inputs: jax.Array


class Activations(NamedTuple):
    """How much images activate the hidden units of a token-mixing MLP.

    Attributes:
      of_image: float32 [units], of one image.
      of_images: float32 [images, units], of those to compare it with.
      images: uint8 [images, height, width, 3], as the model sees them.
    """

    of_image: np.ndarray
    of_images: np.ndarray
    images: np.ndarray


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
      ValueError: there is no such token or unit.
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
    maps = [
        token_influence(captured, row * width + column).reshape(height, width)
        for row, column in tokens
    ]
    activations, missing = None, ""
    key = UNITS.format(block)
    if key not in flatten(loaded.params):
        missing = f"The block has no {key}, and so no hidden units to show."
    elif images is None:
        missing = "No images to compare with: no hidden units are shown."
    else:
        activations = unit_activations(loaded, seen, block, images)
        units = _choose_units(activations, units)

    lower = UNIT_HEIGHT * len(units or []) if activations else 0.3
    figure = Figure((13.5, 4.6 + lower), layout="constrained")
    name = plain(title or loaded.model.model_name or "a Mixer")
    figure.suptitle(f"{name}: what block {block} mixes")
    parts: Any = figure.subfigures(2, 1, height_ratios=(4, 0.3 + lower))
    _draw_maps(parts[0], displayable(seen), tokens, maps)
    if activations is None or units is None:
        parts[1].text(0.5, 0.5, missing, ha="center", va="center")
    else:
        kernel = np.asarray(flatten(loaded.params)[key], np.float32)
        grids = {n: kernel[:, n].reshape(height, width) for n in units}
        _draw_units(parts[1], activations, grids)
    return figure


def capture_block(loaded: LoadedModel, image: np.ndarray, block: int) -> Block:
    """Returns a block of a model, and its input for an image.

    It is the module `MixerBlock_<block>` whatever it computes, and is called with the
    arguments that the model gives it.

    Args:
      loaded: the model.
      image: as the model's transform gives it.
      block: its number.

    Raises:
      CheckpointError: the model calls no module of that name.
    """
    name = f"MixerBlock_{block}"
    found: list[Block] = []

    def intercept(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        bound = context.module
        if bound.name == name and context.method_name == "__call__" and not found:
            module, (x, *others) = bound.clone(parent=None), args

            def function(variables: Any, x: jax.Array) -> jax.Array:
                return module.apply(variables, x[None], *others, **kwargs)[0]

            found.append(Block(function, bound.variables, x[0]))
        return call(*args, **kwargs)

    images = to_model_input(jnp.asarray(image)[None])
    with nn.intercept_methods(intercept):
        loaded.model.apply({"params": loaded.params}, images, train=False)
    if not found:
        raise CheckpointError(f"The model has no block of the name {name}.")
    return found[0]


def token_influence(
    block: Block, token: int, num_probes: int = NUM_PROBES
) -> np.ndarray:
    """Returns what an output token of a block draws from each input token.

    For input token s that is the Frobenius norm of the Jacobian d output[token] /
    d inputs[s], which is [channels, channels], divided by the square root of the number
    of channels. It is 1 for a block that hands the token on as it is.

    The norm is that of the Jacobian's product with `num_probes` random orthonormal
    vectors, times the square root of channels / num_probes. So it is exact if there
    are as many probes as channels; with fewer its square is right on average.

    Args:
      block: see `capture_block`.
      token: which output.
      num_probes: backward passes; of more than there are channels, as many as those.

    Returns:
      float32 [tokens].
    """
    num_channels = block.inputs.shape[-1]
    rng = np.random.default_rng(0)
    shape = (num_channels, min(num_probes, num_channels))
    probes = np.linalg.qr(rng.standard_normal(shape))[0].T.astype(np.float32)

    @jax.jit
    def squares(variables: Any, x: jax.Array, probes: jax.Array) -> jax.Array:
        output, pull_back = jax.vjp(lambda x: block.function(variables, x)[token], x)
        (gradients,) = jax.vmap(pull_back)(probes.astype(output.dtype))
        return jnp.sum(jnp.square(gradients.astype(jnp.float32)), (0, 2))

    parts = np.split(probes, range(BATCH, len(probes), BATCH))
    total = sum(squares(block.variables, block.inputs, part) for part in parts)
    return np.sqrt(np.asarray(total) / len(probes))


def unit_activations(
    loaded: LoadedModel,
    image: np.ndarray,
    block: int,
    images: Iterable[np.ndarray],
) -> Activations:
    """Returns how much images activate the hidden units of a token-mixing MLP.

    A unit is applied to each channel of the tokens. Its activation is the highest of
    all channels, before the GELU.

    Args:
      loaded: a model whose block has a token-mixing MLP.
      image: as the model's transform gives it.
      block: its number.
      images: uint8 [height, width, 3] each; the transform is applied.
    """
    path = tuple(UNITS.format(block).split("/")[:-1])
    params = jax.device_put(loaded.params)

    @jax.jit
    def activate(images: jax.Array) -> jax.Array:
        _, state = loaded.model.apply(
            {"params": params},
            to_model_input(images),
            train=False,
            capture_intermediates=lambda module, _: module.path == path,
            mutable="intermediates",
        )
        captured = traverse_util.flatten_dict(state["intermediates"])
        (hidden,) = captured[(*path, "__call__")]
        return hidden.max(1).astype(jnp.float32)  # of [images, channels, units]

    (of_image,) = np.asarray(activate(jnp.asarray(image)[None]))
    others: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    transformed = map(loaded.transform, images)
    while batch := list(itertools.islice(transformed, BATCH)):
        blanks = [batch[0]] * (BATCH - len(batch))  # so that one program is compiled
        rows.append(np.asarray(activate(np.stack(batch + blanks)))[: len(batch)])
        others += map(displayable, batch)
    return Activations(of_image, np.concatenate(rows), np.stack(others))


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
    maps: Sequence[np.ndarray],
) -> None:
    """Draws an image with marked tokens, and for each a map of what it draws from."""
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.patches import Rectangle
    from matplotlib.patheffects import withStroke

    figure.suptitle(
        "What each output token draws from the input tokens: 1 for a block that hands "
        "the token on as it is. Its own input, in grey, is above the map.",
        **HEADING,
    )
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
        letter = string.ascii_uppercase[i]
        axes, own = panels[1 + i], maps[i][row, column]
        for x in (panels[0], axes):
            for color, line in (("black", 2.5), ("white", 1)):
                x.add_patch(
                    Rectangle(
                        (column, row), 1, 1, fill=False, edgecolor=color, linewidth=line
                    )
                )
            x.text(
                column + 0.5,
                row + 0.5,
                letter,
                ha="center",
                va="center",
                weight="bold",
                color="white",
                path_effects=outline,
            )
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

    figure.suptitle(
        "Hidden units of the token-mixing MLP: their weights for the patches, and the "
        f"images of {len(activations.images):,} that activate them most.\nThe numbers "
        "are activations: the highest of all channels, before the GELU.",
        **HEADING,
    )
    rows = figure.subplots(len(grids), 1 + TOP_IMAGES, squeeze=False)
    for axes in rows.flat:
        axes.set_axis_off()
    for row, (n, grid) in zip(rows, grids.items(), strict=True):
        row[0].imshow(
            scaled(grid), cmap=DIVERGING, vmin=-1, vmax=1, interpolation="nearest"
        )
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
