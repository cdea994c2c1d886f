"""Figures of runs and models: plot runs, plot weights, plot mixing."""

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence

import numpy as np
from tqdm import tqdm
from tyro.conf import Positional

from mixer_jax.cli.app import UsageError, plot_app
from mixer_jax.cli.models import Flags, ImageSize, Model
from mixer_jax.data.dataset import DatasetError, Example, Source, readable
from mixer_jax.data.decode import ImageError
from mixer_jax.data.names import printable
from mixer_jax.data.walk import find_images
from mixer_jax.run.loading import LoadedModel, load_model, open_test_split
from mixer_jax.visualize.files import check_figure_path, save_figure
from mixer_jax.weights.layout import CheckpointError
from mixer_jax.weights.published import without_secrets

MAX_IMAGES = 512  # a B/16 takes about a minute for them on a laptop


@plot_app.command
def runs(
    workdirs: Positional[list[str]],
    output: pathlib.Path = pathlib.Path("metrics.png"),
) -> None:
    """Draws loss, accuracy, learning rate and speed of one or several runs by step.

    Args:
      workdirs: the work directories of the runs, finished or not.
      output: the file to write, .png or .svg.
    """
    from mixer_jax.visualize import draw_runs

    check_figure_path(output)
    if not workdirs:
        raise UsageError("Name the workdir of a run, or of several.")
    try:
        figure = draw_runs(workdirs)
    except ValueError as error:
        raise UsageError(str(error)) from error
    save_figure(figure, output)
    print(printable(output))


@plot_app.command
def weights(
    model: Model,
    blocks: tuple[int, ...] = (),
    pairs: int = 32,
    image_size: ImageSize = None,
    output: pathlib.Path = pathlib.Path("weights.png"),
) -> None:
    """Draws what a model has learned to look for, as the paper's figures 5 to 7 do.

    Hidden units of token-mixing MLPs as grids of patches, each beside its closest
    inverse, and filters of the stem; both from low to high frequency.

    Args:
      blocks: whose units to draw. Default: the first three.
      pairs: of units to draw of each block, at most.
      image_size: size of the images in pixels, such as 224 or 320x224 (height x
        width). Default: what the model is for. For another size its parameters are
        interpolated.
      output: the file to write, .png or .svg.
    """
    from mixer_jax.visualize import draw_weights

    check_figure_path(output)
    if pairs < 1:
        raise UsageError(f"--pairs is {pairs}; 1 is the least.")
    loaded = load_model(model, image_size=image_size)
    title = printable(without_secrets(model))
    figure = draw_weights(loaded, title=title, blocks=blocks or None, num_pairs=pairs)
    save_figure(figure, output)
    print(printable(output))


@plot_app.command
def mixing(
    model: Model,
    image: Positional[pathlib.Path],
    flags: Flags,
    block: int = 0,
    tokens: tuple[tuple[int, int], ...] = (),
    units: tuple[int, ...] = (),
    images: tuple[str, ...] = (),
    output: pathlib.Path = pathlib.Path("mixing.png"),
) -> None:
    """Draws what tokens of an image draw from which others at a block of a model.

    Below are hidden units of the token-mixing MLP of the block, each with the images
    that activate it most.

    Args:
      image: a file.
      block: its number, from 0.
      tokens: ROW COLUMN of each output token, from 0. Default: four of them.
      units: numbers of hidden units. Default: the four that the image activates most,
        compared with the other images.
      images: files, folders or globs of images to find those that activate the units
        most. Default: the images that the run was tested on, at most 512 of them.
      output: the file to write, .png or .svg.
    """
    from mixer_jax.visualize import draw_mixing

    check_figure_path(output)
    loaded, transform = flags.load(model)
    loaded = dataclasses.replace(loaded, transform=transform)
    try:
        pixels = Example(image, -1, str(image)).pixels()
    except ImageError as error:
        raise UsageError(f"{printable(image)}: {error}.") from error
    try:
        figure = draw_mixing(
            loaded,
            pixels,
            title=printable(f"{without_secrets(model)}, {image}"),
            block=block,
            tokens=tokens or None,
            units=units or None,
            images=_images_to_compare(loaded, images),
        )
    except CheckpointError:
        raise
    except ValueError as error:
        raise UsageError(str(error)) from error
    save_figure(figure, output)
    print(printable(output))


def _images_to_compare(
    loaded: LoadedModel, patterns: Sequence[str]
) -> Iterator[np.ndarray] | None:
    """Returns images of files, or of the run's dataset; None if there are neither."""
    source: Sequence[Example] | Source
    if patterns:
        source = [Example(pathlib.Path(x), -1, x) for x in find_images(patterns)]
    elif loaded.config:
        try:
            opened, split = open_test_split(loaded, None)
        except DatasetError as error:
            raise UsageError(f"{error} Or give --images.") from error
        source = opened.split(split)
    else:
        return None
    count = min(len(source), MAX_IMAGES)
    chosen = np.linspace(0, len(source) - 1, count).round().astype(int).tolist()
    shown = tqdm(chosen, unit=" images", disable=None, leave=False)
    return (pixels for _, pixels in readable(source[i] for i in shown))
