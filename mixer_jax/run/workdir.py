"""The work directory of a run: what it records, and which runs it refuses."""

import json
import logging
import os
import pathlib
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mixer_jax.data.fingerprint import changes
from mixer_jax.data.names import listing, printable
from mixer_jax.files import remove_partial, replace_when_whole, writing
from mixer_jax.run.changes import LENGTH_KEYS, may_change
from mixer_jax.run.config import Config, ConfigError, flatten
from mixer_jax.run.data import Data
from mixer_jax.run.model import FIELD_DEFAULTS
from mixer_jax.run.paths import (
    absolute_folder,
    is_dataset,
    resolved,
    with_absolute_paths,
)
from mixer_jax.run.records import (
    HISTORY,
    read_recorded_config,
    read_recorded_data,
    read_recorded_names,
)
from mixer_jax.training import sharding
from mixer_jax.training.checkpointing import damaged_checkpoints, saved_steps
from mixer_jax.training.processes import check_shared
from mixer_jax.training.rows import parse_row, read_rows
from mixer_jax.weights.layout import CheckpointError
from mixer_jax.weights.npz import read_shapes, save_checkpoint

# Keys that the config.json of older runs lacks, each with the value that leaves a run
# as it was. A key that is added to configs/common.py is added here too.
ADDED_KEYS: dict[str, Any] = {
    "profile_steps": 0,
    "max_run_secs": 0,
    "init_from": None,
    "label_key": None,
    "resolution": "error",
    "pp.interpolation": None,
    "pp.mean": 0.5,
    "pp.std": 0.5,
    "on_nonfinite": "stop",
    "nonfinite_limit": 10,
    "workers": None,
}

# In config.json: the paths that are absolute there, as they were typed.
AS_TYPED = "as_typed"

# What `write_description` writes.
DESCRIPTION = ("class_names.json", "dataset.json", "config.json")

logger = logging.getLogger(__name__)


def workdir_path(workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the absolute path of a folder that a run may be in.

    Raises:
      ConfigError: it is a URL, or its name is not in UTF-8.
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
    return path


def open_workdir(config: Config, workdir: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the absolute path of a folder for the run, made if there is none.

    The same config may have paths that are spelled otherwise. Whether another dataset
    is the same one, at another place, shows later: see `check_same_data`.

    Raises:
      ConfigError: as `workdir_path`, or it has the result of a run with another config,
        or of one whose checkpoints are gone.
      ProcessError: another process sees another folder.
    """
    path = workdir_path(workdir)
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        check_shared(path)
    differences = _differences(config, path)
    if not all(may_change(key) or is_dataset(key) for key in differences):
        raise _other_config(path, differences)
    _check_not_gone(path)
    if jax.process_index() == 0:
        remove_partial(path, "metrics.jsonl", "final.npz", *DESCRIPTION)
    return path


def _check_not_gone(workdir: pathlib.Path) -> None:
    """Raises ConfigError if a run has saved, and none of its checkpoints is there.

    It would begin again. A run that was killed before its first checkpoint may.
    """
    folder, metrics = workdir / "checkpoints", workdir / "metrics.jsonl"
    if saved_steps(workdir) or damaged_checkpoints(workdir):
        return
    found = "final.npz" if (workdir / "final.npz").exists() else ""
    if not found and metrics.exists():
        with metrics.open("rb") as file:
            steps = [row["step"] for line in file if (row := parse_row(line))]
        last = max(steps, default=0)
        # The folder is there before the first row. A save waits for the one before.
        if last and not folder.exists():
            found = f"metrics.jsonl up to step {last:.0f}"
        elif last and (workdir / "config.json").exists():
            every = read_recorded_config(workdir).get("checkpoint_every", last)
            if last > 2 * every:
                found = f"metrics.jsonl up to step {last:.0f}"
    if found:
        raise ConfigError(
            f"{workdir} has {found}, and no checkpoint in {folder}. To continue that "
            "run, bring this folder back. To train from the start, take another "
            f"--workdir; --config.init_from={workdir} then starts from final.npz, if "
            "that is there."
        )


def recorded_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the flat config of the run in a folder; {} if it has no result."""
    path = workdir / "config.json"
    if not path.exists() or not _has_result(workdir):
        return {}
    recorded = read_recorded_config(workdir)
    for key in (AS_TYPED, HISTORY):
        recorded.pop(key, None)
    return flatten(recorded)


def _has_result(workdir: pathlib.Path) -> bool:
    return (workdir / "final.npz").exists() or bool(saved_steps(workdir))


def _differences(config: Config, workdir: pathlib.Path) -> dict[str, tuple[Any, Any]]:
    """Returns the values there and now of the keys that differ, if there is a result.

    A key that one of the two lacks is "absent" there.
    """
    recorded = recorded_config(workdir)
    if not recorded:
        return {}
    new = flatten(json.loads(config.to_json()))
    fields = {key: x for key, x in FIELD_DEFAULTS.items() if key in new}
    old = ADDED_KEYS | fields | recorded
    one, other = resolved(old), resolved(new)
    name, there = new.get("pretrained_dir"), one.get("pretrained_dir")
    # A path whose folder is gone looks like a name of the hub.
    if name and os.path.realpath(absolute_folder(name)) == there:
        other["pretrained_dir"] = there
    absent = object()
    return {
        key: (old.get(key, "absent"), new.get(key, "absent"))
        for key in dict.fromkeys((*old, *new))
        if one.get(key, absent) != other.get(key, absent)
    }


def _other_config(
    workdir: pathlib.Path, differences: Mapping[str, tuple[Any, Any]]
) -> ConfigError:
    table = ""
    for key, (old, new) in differences.items():
        note = may_change(key)
        table += f"\n  {key}: {old} there, {new} now{note and f' ({note})'}"
    return ConfigError(
        f"{workdir} holds a run with another config:{table}\nTake another "
        "--workdir, or the same config to continue that run."
    )


def check_same_data(config: Config, data: Data, workdir: pathlib.Path) -> None:
    """Refuses to continue a run on other data than it began with.

    A dataset that is at another place now may be the same; that is said.

    Args:
      config: of the run, with durations in steps.
      data: as it is now.
      workdir: of the run.

    Raises:
      ConfigError: the data differ. The message lists how.
    """
    if not _has_result(workdir):
        return
    differences = _differences(config, workdir).items()
    moved = {key: values for key, values in differences if is_dataset(key)}
    _, before = read_recorded_data(workdir)
    if before:
        lines = changes(before, data.fingerprint)
    elif moved:  # and nothing shows that it is the same
        raise _other_config(workdir, moved)
    else:
        lines = _changes_without_fingerprint(config, data, workdir)
    places = [
        printable(f"{key}: {old} then, {new} now") for key, (old, new) in moved.items()
    ]
    if lines:
        listed = "".join(f"\n  {line}" for line in (*places, *lines))
        raise ConfigError(
            f"The data are not what they were when the run in {workdir} began:"
            f"{listed}\nTo continue it, bring the data back as they were. To train on "
            "them as they are, take another --workdir; --config.init_from="
            f"{workdir} then starts from the parameters of this run."
        )
    for place in places:
        logger.info("data     moved, with the same images; %s", place)


def _changes_without_fingerprint(
    config: Config, data: Data, workdir: pathlib.Path
) -> list[str]:
    """Compares what a run of before fingerprints were kept tells of its data."""
    path = workdir / "class_names.json"
    lines = []
    if path.exists():
        old, new = read_recorded_names(workdir), list(data.class_names)
        if old != new:
            changed = sorted(set(old) ^ set(new)) or ["their order"]
            lines.append(
                f"classes: {len(old)} before, {len(new)} now; changed: "
                f"{listing(changed, 10)}"
            )
    now, then = len(data.train_source), _num_trained_on(config, workdir)
    if then not in (None, now):
        lines.append(f"train: {then:,} images before, {now:,} now")
    last_step = max(saved_steps(workdir), default=0)
    if last_step > config.total_steps:
        lines.append(
            f"train: {now:,} images make {config.total_steps} steps, "
            f"and step {last_step} is done"
        )
    return lines


def _num_trained_on(config: Config, workdir: pathlib.Path) -> int | None:
    """Returns the number of training images, as the metrics of a run tell it."""
    path = workdir / "metrics.jsonl"
    rows = read_rows(path) if path.exists() else []
    row = next((row for row in rows if row.get("train/epoch")), None)
    return round(row["step"] * config.batch / row["train/epoch"]) if row else None


def write_description(
    config: Config, data: Data, workdir: pathlib.Path, step: int
) -> None:
    """Writes the files that a later start is compared with, and that loading reads.

    A change of the config is added to the history in config.json.

    Args:
      config: of the run, with durations as they are given.
      data: of the run.
      workdir: of the run.
      step: that the run continues from.
    """
    if jax.process_index() != 0:
        return
    absolute, typed = with_absolute_paths(config)
    described = json.loads(absolute.to_json())
    if typed:
        described[AS_TYPED] = typed
    path, changed = workdir / "config.json", _differences(config, workdir)
    history = []
    if _has_result(workdir) and path.exists():
        history = read_recorded_config(workdir).get(HISTORY, [])
    if changed:
        now = time.strftime("%Y-%m-%d %H:%M:%S %Z")
        history.append({"step": step, "time": now, "changed": changed})
        listed = [f"{key} from {old} to {new}" for key, (old, new) in changed.items()]
        logger.info("changed  %s", printable(", ".join(listed)))
    if history:
        described[HISTORY] = history
    if changed.keys() & LENGTH_KEYS:  # that of a shorter run would look like the result
        (workdir / "final.npz").unlink(missing_ok=True)
    about = {"multilabel": data.multilabel, "fingerprint": data.fingerprint}
    contents = (list(data.class_names), about, described)
    for name, content in zip(DESCRIPTION, contents, strict=True):
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
      overwrite: whether to write it where a whole one exists too.
    """
    # One process looks, for all must take part.
    is_first = jax.process_index() == 0
    is_whole = not overwrite and is_first and _is_whole(path)
    if multihost_utils.broadcast_one_to_all(np.int32(is_whole)):
        return
    whole = jax.jit(lambda x: x, out_shardings=sharding.replicated(mesh))(params)
    if is_first:
        save_checkpoint(path, jax.device_get(whole))
    multihost_utils.sync_global_devices("final parameters written")


def _is_whole(path: pathlib.Path) -> bool:
    """Returns whether an npz file is there and can be read; warns if it is damaged."""
    try:
        return path.exists() and bool(read_shapes(path))
    except CheckpointError as error:
        logger.warning("%s It is written again.", error)
        return False
