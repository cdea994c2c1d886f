"""The work directory of a run: what it records, and which runs it refuses."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mixer_jax.data.names import printable
from mixer_jax.files import replace_when_whole
from mixer_jax.model import MlpMixer
from mixer_jax.run.config import Config, ConfigError, flatten
from mixer_jax.run.data import Data
from mixer_jax.training import sharding
from mixer_jax.training.checkpointing import saved_steps
from mixer_jax.training.processes import check_shared
from mixer_jax.weights.npz import save_checkpoint

# What may change between two starts of a run: the result does not depend on it.
FREE_KEYS = {
    "keep_checkpoints",
    "mesh.fsdp",
    "prefetch",
    "profile_steps",
    "progress_every",
    "tfds_data_dir",
    "tfds_manual_dir",
}

# Keys that the config.json of older runs lacks, each with the value that leaves a run
# as it was. A key that is added to configs/common.py is added here too.
ADDED_KEYS: dict[str, Any] = {"profile_steps": 0}


def open_workdir(config: Config, workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the absolute path of a folder for the run, made if there is none.

    Raises:
      ConfigError: it is a URL, or has the result of a run with another config.
      ProcessError: another process sees another folder.
    """
    if "://" in os.fspath(workdir):
        raise ConfigError(
            f"The workdir is {os.fspath(workdir)}, a URL. It must be a folder."
        )
    path = pathlib.Path(workdir).expanduser().absolute()
    if printable(path) != str(path):
        raise ConfigError(
            f"The workdir is {printable(path)}: its name is not in UTF-8, and Orbax "
            "writes no checkpoints there. Take another --workdir."
        )
    path.mkdir(parents=True, exist_ok=True)
    check_shared(path)
    _check_config_is_the_same(config, path)
    return path


def _check_config_is_the_same(config: Config, workdir: pathlib.Path) -> None:
    """Refuses the folder of a run with another config, if it has a result."""
    path = workdir / "config.json"
    has_result = (workdir / "final.npz").exists() or bool(saved_steps(workdir))
    if not path.exists() or not has_result:
        return
    new = flatten(_as_json(config))
    # A field that was added to the model since then had its default.
    fields = {
        f"model.{x.name}": json.loads(json.dumps(x.default))  # tuples as lists
        for x in dataclasses.fields(MlpMixer)
        if f"model.{x.name}" in new and x.default is not dataclasses.MISSING
    }
    old = ADDED_KEYS | fields | flatten(json.loads(path.read_text("utf-8")))
    missing = object()
    keys = [k for k in old | new if old.get(k, missing) != new.get(k, missing)]
    if set(keys) - FREE_KEYS:
        table = "\n".join(
            f"  {k}: {old.get(k, 'absent')} there, {new.get(k, 'absent')} now"
            for k in keys
        )
        raise ConfigError(
            f"{workdir} holds a run with another config:\n{table}\nTake another "
            "--workdir, or the same config to continue that run."
        )


def check_resumable(
    config: Config, data: Data, start_step: int, workdir: pathlib.Path
) -> None:
    """Raises ConfigError if the dataset is not the one that the run began with."""
    path = workdir / "class_names.json"
    if not start_step or not path.exists():
        return
    old, new = json.loads(path.read_text("utf-8")), list(data.class_names)
    if old != new or start_step > config.total_steps:
        changed = sorted(set(old) ^ set(new)) or [f"{len(data.train_source)} images"]
        raise ConfigError(
            f"{config.dataset} is not what it was when the run in {workdir} began: now "
            f"{len(new)} classes, then {len(old)}, and step {start_step} of "
            f"{config.total_steps} is done. Changed: {', '.join(changed[:10])}. Take "
            "another --workdir, or the dataset as it was."
        )


def write_description(
    config: Config, class_names: Sequence[str], workdir: pathlib.Path
) -> None:
    """Writes the files that a later start is compared with, and that loading reads."""
    if jax.process_index() == 0:
        for name, content in (
            ("class_names.json", list(class_names)),
            ("config.json", _as_json(config)),
        ):
            with replace_when_whole(workdir / name) as partial:
                partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def write_result(
    path: pathlib.Path, params: Any, mesh: Mesh, *, overwrite: bool
) -> None:
    """Writes parameters in the published layout; a part of several processes.

    Args:
      path: of the npz file.
      params: the model's parameters, on the devices of `mesh`.
      mesh: of the run.
      overwrite: whether to write it where it exists too.
    """
    # One process looks, for all must take part.
    missing = multihost_utils.broadcast_one_to_all(np.int32(not path.exists()))
    if not (overwrite or missing):
        return
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(params)
    if jax.process_index() == 0:
        save_checkpoint(path, jax.device_get(whole))
    multihost_utils.sync_global_devices("final parameters written")


def _as_json(config: Config) -> dict[str, Any]:
    """Returns a config as its config.json has it."""
    return json.loads(config.to_json())
