"""What a work directory records of its run, and what it refuses."""

import json
import pathlib
from collections.abc import Sequence
from typing import Any

import jax

from mixer_jax.files import replace_when_whole
from mixer_jax.run.config import Config, ConfigError
from mixer_jax.run.data import Data

# What may change between two starts of a run: nothing of the result depends on it.
FREE_KEYS = {
    "keep_checkpoints",
    "mesh.fsdp",
    "prefetch",
    "progress_every",
    "tfds_data_dir",
    "tfds_manual_dir",
}


def check_workdir(config: Config, workdir: pathlib.Path) -> None:
    """Refuses the work directory of a run with another config, if it has a result."""
    path = workdir / "config.json"
    has_result = any((workdir / "checkpoints").glob("[0-9]*"))
    if not path.exists() or not (has_result or (workdir / "final.npz").exists()):
        return
    old, new = _flatten(json.loads(path.read_text())), _flatten(as_json(config))
    missing = object()
    keys = [k for k in old | new if old.get(k, missing) != new.get(k, missing)]
    if set(keys) - FREE_KEYS:
        table = "\n".join(
            f"  {k}: {old.get(k, 'absent')} there, {new.get(k, 'absent')} now"
            for k in keys
        )
        raise ConfigError(
            f"{workdir} holds a run with another config:\n{table}\nTake another "
            "--workdir, or the same config to go on with that run."
        )


def check_resumable(
    config: Config, data: Data, start_step: int, workdir: pathlib.Path
) -> None:
    """Refuses to go on with a dataset that is not the one that the run began with."""
    path = workdir / "class_names.json"
    if not start_step or not path.exists():
        return
    old, new = json.loads(path.read_text()), list(data.class_names)
    if old != new or start_step > config.total_steps:
        changed = sorted(set(old) ^ set(new)) or [f"{len(data.train_source)} images"]
        raise ConfigError(
            f"{config.dataset} is not what it was when the run in {workdir} began: now "
            f"{len(new)} classes, then {len(old)}, and step {start_step} of "
            f"{config.total_steps} is done. Changed: {', '.join(changed[:10])}. Take "
            "another --workdir, or the dataset as it was."
        )


def write_workdir(
    config: dict[str, Any], class_names: Sequence[str], workdir: pathlib.Path
) -> None:
    """Writes what a later start is compared with."""
    if jax.process_index() == 0:
        for name, content in (
            ("class_names.json", list(class_names)),
            ("config.json", config),
        ):
            with replace_when_whole(workdir / name) as partial:
                partial.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def as_json(config: Config) -> dict[str, Any]:
    """Returns a config as its config.json has it."""
    return json.loads(config.to_json())


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
