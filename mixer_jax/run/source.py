"""Where parameters are from: a run, or whatever else `mixer_jax.weights` reads."""

import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mixer_jax.data.preprocess import HALF
from mixer_jax.run.model import FIELD_DEFAULTS
from mixer_jax.run.records import read_run
from mixer_jax.variants import count_patches
from mixer_jax.weights import huggingface, layout
from mixer_jax.weights.about import ABOUT_FIELDS, About
from mixer_jax.weights.layout import CheckpointError
from mixer_jax.weights.npz import merge_pretrained, read_checkpoint
from mixer_jax.weights.reading import Weights, WeightsSource, open_weights
from mixer_jax.weights.resolution import RESOLUTIONS, adapt

logger = logging.getLogger(__name__)

# Of the keys pp.*, those that are fields of EvalTransform and go with the parameters.
TRANSFORM = ("crop", "evaluation", "resize", "interpolation", "mean", "std")


def find_workdir(name_or_path: str | os.PathLike[str]) -> pathlib.Path | None:
    """Returns the workdir of a run that a path stands for; None if it is no run's.

    The final.npz of a run stands for it. A folder that is none of the Hugging Face hub
    is meant to be a workdir.
    """
    path = pathlib.Path(name_or_path).expanduser()
    if path.name == "final.npz" and _is_workdir(path.parent) and path.is_file():
        return path.parent
    if path.is_dir() and (_is_workdir(path) or not huggingface.is_folder(path)):
        return path
    return None


def _is_workdir(folder: pathlib.Path) -> bool:
    return all((folder / x).is_file() for x in ("config.json", "class_names.json"))


def read_run_params(workdir: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Returns a run's parameters, and the file or checkpoint that they are from.

    That is final.npz, or the newest whole checkpoint if the run is not finished or that
    file is damaged. A warning names what is damaged. Nothing is written.

    Raises:
      FileNotFoundError: there is neither.
      CheckpointError: final.npz is damaged, and there is no checkpoint.
      DamagedError: all checkpoints are damaged, and final.npz is, or is not there.
    """
    final, found = workdir / "final.npz", None
    if final.exists():
        try:
            return read_checkpoint(final), str(final)
        except CheckpointError as error:
            found = error
    # Orbax takes a third of a second to import, and is seldom needed.
    from mixer_jax.training.checkpointing import read_latest_params, saved_steps

    if found is not None and not saved_steps(workdir):
        raise found
    if found is not None:
        logger.warning("%s The newest checkpoint is read instead.", found)
    params, step = read_latest_params(workdir)
    return params, f"{workdir}, step {step}"


def open_source(name_or_path: str | os.PathLike[str]) -> WeightsSource:
    """Tells what a name or a path stands for, and what is known of it.

    Args:
      name_or_path: the workdir of a run, or what `open_weights` takes.

    Raises:
      OSError, CheckpointError: as `open_weights` and `read_run`.
    """
    workdir = find_workdir(name_or_path)
    return open_weights(name_or_path) if workdir is None else open_run(workdir)


def open_run(workdir: pathlib.Path) -> WeightsSource:
    """Returns the parameters of a run, and what is known of them.

    Raises:
      CheckpointError: as `read_run`.
    """
    config, class_names, *_ = read_run(workdir)
    # Runs of before these keys had what is the default now.
    model = {x: FIELD_DEFAULTS.get(f"model.{x}") for x in ABOUT_FIELDS}
    model, pp = model | config["model"], {"mean": HALF, "std": HALF} | config["pp"]
    about = About(
        {x: model[x] for x in ABOUT_FIELDS if model.get(x) is not None},
        {x: pp[x] for x in TRANSFORM if pp.get(x) is not None},
        class_names,
    )
    return WeightsSource(
        about,
        lambda: read_run_params(workdir),
        lambda: layout.shapes_of(read_run_params(workdir)[0]),
    )


def load_checkpoint(name_or_path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the parameters of a Mixer.

    Args:
      name_or_path: a published name, such as "imagenet21k/Mixer-B_16"; the workdir of a
        run; an npz or a safetensors file; or what else `open_weights` takes.

    Returns:
      The published parameter tree, a nested dict of float32 numpy arrays.

    Raises:
      OSError: there is no such file, or it cannot be fetched.
      CheckpointError: the file is not a sound Mixer, or not the one that was named.
    """
    weights = open_source(name_or_path).load()
    if find_workdir(name_or_path) is None:  # a run may have a changed model
        layout.infer_model(weights.params, weights.where)
    return weights.params


def load_pretrained(
    name_or_path: str | os.PathLike[str],
    init_params: Mapping[str, Any],
    resolution: str = "error",
    grid: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Returns new parameters to fine-tune: those of the file, but for the head.

    The head always comes from `init_params`, whatever the file has (vit_jax's rule); a
    new head starts at zero. The model may have more or fewer parameters than the file:
    see `mixer_jax.weights.npz.merge_pretrained`.

    Args:
      name_or_path: as for `load_checkpoint`.
      init_params: the "params" that the new model's init returns. Of those that are
        taken from the file only shapes are read, so jax.ShapeDtypeStruct will do there.
      resolution: what to do if the model is for images or patches of another size than
        the file: "error", or adapt the parameters by "block_diagonal" or "interpolate".
        See `mixer_jax.weights.resolution`.
      grid: patches (down, across) of the model's images. Default: as many down as
        across. It is read only if the parameters are adapted.

    Returns:
      The tree of `init_params`: numpy arrays from the file, the rest as given.

    Raises:
      OSError: there is no such file, or it cannot be fetched.
      CheckpointError: the file is not sound, or does not fit the model; every key at
        fault is named with the shapes found and expected.
      ValueError: there is no such `resolution`.
    """
    if resolution not in RESOLUTIONS:
        raise ValueError(
            f"resolution is {resolution!r}, expected one of {', '.join(RESOLUTIONS)}."
        )
    weights = open_source(name_or_path).load()
    params, where = weights.params, weights.where
    if resolution != "error":
        shapes = layout.shapes_of(init_params)
        new_grid = grid or _square_grid(shapes)
        params = adapt(
            params, shapes, new_grid, resolution, grid=_grid(weights), where=where
        )
    return merge_pretrained(init_params, params, where)


def _grid(weights: Weights) -> tuple[int, int] | None:
    """Returns the numbers of patches (down, across) that parameters are for.

    None if it is as many down as across, which `adapt` finds itself.
    """
    patch = layout.shapes_of(weights.params).get("stem/kernel", ())[:2]
    if weights.transform is None or len(patch) != 2:
        return None
    down, across = count_patches(weights.transform.crop, patch)
    return None if down == across else (down, across)


def _square_grid(shapes: layout.Shapes) -> tuple[int, int]:
    """Returns the numbers of patches (down, across) of a model's images."""
    sizes = layout.infer_sizes(shapes, "init_params without a grid")
    side = math.isqrt(sizes.num_tokens)
    if side * side != sizes.num_tokens:
        raise CheckpointError(
            f"init_params are for {sizes.num_tokens} tokens, which are no square grid "
            "of patches: give the grid."
        )
    return side, side
