"""The state that a run starts from: new, from a published file, or from another run."""

import json
import logging
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mixer_jax.data.sizes import as_size, as_value
from mixer_jax.model import MlpMixer
from mixer_jax.run.config import Config, ConfigError, flatten
from mixer_jax.run.model import FIELD_DEFAULTS
from mixer_jax.run.paths import absolute_folder
from mixer_jax.run.program import Program
from mixer_jax.run.records import read_run
from mixer_jax.run.source import load_pretrained, read_run_params
from mixer_jax.training import sharding
from mixer_jax.training.checkpointing import saved_steps
from mixer_jax.training.processes import first_process_first
from mixer_jax.training.step import TrainState
from mixer_jax.variants import count_patches
from mixer_jax.weights.layout import (
    check_shapes,
    shapes_of_model,
    unflatten,
)
from mixer_jax.weights.layout import (
    flatten as flatten_params,
)
from mixer_jax.weights.names import is_head
from mixer_jax.weights.npz import merge_pretrained
from mixer_jax.weights.published import without_secrets
from mixer_jax.weights.reading import find_checkpoint

logger = logging.getLogger(__name__)

# Fields of the model that change neither its parameters nor what it computes in an
# evaluation, so that a run may start from one that had others.
_FREE_FIELDS = {
    "model.model_name",
    "model.dtype",
    "model.remat",
    "model.scan_blocks",
    "model.stoch_depth",
    "model.dropout_rate",
}


def check_start(config: Config, workdir: pathlib.Path) -> None:
    """Looks at the run of init_from, before the dataset is opened.

    A run that has a checkpoint does not need it any more.

    Raises:
      CheckpointError: it is not there, or not the workdir of a run.
      ConfigError: it has another model.
    """
    if saved_steps(workdir):
        return
    if config.init_from:
        _check_same_model(config, pathlib.Path(absolute_folder(config.init_from)))


def _check_same_model(config: Config, workdir: pathlib.Path) -> None:
    run = read_run(workdir)
    old, new = (
        FIELD_DEFAULTS | flatten({"model": values["model"], "pp.crop": _crop(values)})
        for values in (run.config, json.loads(config.to_json()))
    )
    lines = [
        f"  {key}: {old.get(key, 'absent')} there, {new.get(key, 'absent')} here"
        for key in dict.fromkeys((*old, *new))
        if key not in _FREE_FIELDS and old.get(key) != new.get(key)
    ]
    if lines:
        raise ConfigError(
            f"init_from is {workdir}, a run of another model:\n"
            + "\n".join(lines)
            + "\nSet these keys as they are there."
        )


def _crop(config: Mapping[str, Any]) -> Any:
    return as_value(as_size(config["pp"]["crop"]))


def initial_state(
    config: Config, program: Program, class_names: Sequence[str], mesh: Mesh
) -> TrainState:
    """Returns the state before the first step.

    Its parameters are new, or a file's with a new head, or those of another run with
    its head for the classes of the same name.

    Args:
      config: see configs/common.py.
      program: of the run.
      class_names: of the dataset.
      mesh: of the run.

    Raises:
      OSError, CheckpointError: what pretrained_dir or init_from names cannot be read,
        or its parameters do not fit.
    """
    rng, _ = jax.random.split(jax.random.key(config.seed))
    state = program.init(rng)
    if config.init_from:
        params = _params_of_run(config, program, state.params, class_names, mesh)
    elif config.pretrained_dir:
        name = find_checkpoint(config.pretrained_dir, config.model.model_name)
        grid = count_patches(as_size(config.pp.crop), program.model.patches.size)
        params = first_process_first(
            load_pretrained, name, state.params, config.resolution, grid
        )
        logger.info("start    from %s, with a new head", without_secrets(name))
    else:
        return state

    def put(value: Any, old: jax.Array) -> jax.Array:
        if value is old:  # the head, and what the file does not have
            return old
        return jax.make_array_from_callback(
            old.shape, old.sharding, lambda index: value[index]
        )

    return state.replace(params=jax.tree.map(put, params, state.params))


def _params_of_run(
    config: Config,
    program: Program,
    init_params: Any,
    class_names: Sequence[str],
    mesh: Mesh,
) -> Any:
    """Returns the parameters of the run of init_from, sorted by this run's classes.

    What depends on the classes, the head, has the run's values for those of the same
    name, and those of `init_params` for the others.
    """
    workdir = pathlib.Path(absolute_folder(config.init_from))
    old_names = read_run(workdir).class_names
    params, where = first_process_first(read_run_params, workdir)
    kept = [i for i, name in enumerate(class_names) if name in old_names]
    old_kept = [old_names.index(class_names[i]) for i in kept]

    fresh, found = flatten_params(init_params), flatten_params(params)
    axes = _class_axes(config, program.model, len(class_names))
    by_class = [key for key in fresh if key in axes or is_head(key)]
    body = merge_pretrained(
        unflatten({key: x for key, x in fresh.items() if key not in by_class}),
        unflatten({key: x for key, x in found.items() if key not in by_class}),
        where,
    )
    head = {}
    for key in by_class:  # in one order in all processes
        if key not in found:
            continue
        expected = list(fresh[key].shape)
        if key in axes:
            expected[axes[key]] = len(old_names)
        check_shapes(
            {key: found[key].shape}, {key: tuple(expected)}, f"{where} does not fit."
        )
        head[key] = found[key]
        if key in axes:
            whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))
            head[key] = np.array(jax.device_get(whole(fresh[key])))
            rows = np.moveaxis(head[key], axes[key], 0)  # a view
            rows[kept] = np.moveaxis(found[key], axes[key], 0)[old_kept]
    logger.info(
        "start    from %s, with its head for %d classes of the same name; %d classes "
        "are new, %d of the %d there are dropped",
        where,
        len(kept),
        len(class_names) - len(kept),
        len(old_names) - len(kept),
        len(old_names),
    )
    return unflatten(fresh | flatten_params(body) | head)


def _class_axes(config: Config, model: MlpMixer, num_classes: int) -> dict[str, int]:
    """Returns, for parameters that have one, the axis of the classes."""
    image_shape = (*as_size(config.pp.crop), 3)
    shapes, larger = (
        shapes_of_model(model.clone(num_classes=n), image_shape)
        for n in (num_classes, num_classes + 1)
    )
    return {
        key: next(i for i, size in enumerate(shape) if size != larger[key][i])
        for key, shape in shapes.items()
        if shape != larger[key]
    }
