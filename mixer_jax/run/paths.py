"""The paths in a config: a workdir keeps them so that they are valid everywhere."""

import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mixer_jax.run.config import Config, flatten
from mixer_jax.run.keys import row_of
from mixer_jax.weights.hub import is_hub_name
from mixer_jax.weights.published import PUBLISHED, is_published_folder


def absolute_folder(name: str) -> str:
    """Returns the absolute path of a folder; a URL stays as it is."""
    return name if "://" in name else os.path.abspath(os.path.expanduser(name))


def absolute_dataset(name: str) -> str:
    """Returns the absolute path of a folder or file of images; other names stay."""
    is_path = name != "digits" and pathlib.Path(name).expanduser().exists()
    return absolute_folder(name) if is_path else name


def absolute_pretrained(name: str) -> str:
    """Returns the absolute path of a file or folder of parameters; names stay."""
    is_name = is_published_folder(name) or name in PUBLISHED or is_hub_name(name)
    return name if is_name else absolute_folder(name)


# The keys whose values may be paths, and what makes these absolute.
_PATHS = {
    "dataset": absolute_dataset,
    "evals.*.dataset": absolute_dataset,
    "init_from": absolute_folder,
    "pretrained_dir": absolute_pretrained,
    "tfds_data_dir": absolute_folder,
    "tfds_manual_dir": absolute_folder,
}


def is_dataset(key: str) -> bool:
    """Returns whether a key of a config names a dataset."""
    return _PATHS.get(row_of(key)) is absolute_dataset


def absolute_paths(values: Mapping[str, Any]) -> dict[str, str]:
    """Returns, of the flat values of a config, those that are paths, made absolute."""
    return {
        key: _PATHS[row_of(key)](value)
        for key, value in values.items()
        if value and row_of(key) in _PATHS
    }


def with_absolute_paths(config: Config) -> tuple[Config, dict[str, str]]:
    """Returns a copy of a config with absolute paths, and the paths that this changed.

    The latter are by key, as they were typed.
    """
    typed = flatten(config.to_dict())
    absolute = absolute_paths(typed)
    config = config.copy_and_resolve_references()
    config.update_from_flattened_dict(absolute)
    return config, {k: typed[k] for k in absolute if typed[k] != absolute[k]}


def resolved(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the flat values of a config with one spelling for each path.

    Relative paths count from the current directory, as they do in a config.json of
    before paths were kept absolute. Symbolic links are followed.
    """
    paths = {
        key: os.path.realpath(path) if os.path.isabs(path) else path
        for key, path in absolute_paths(values).items()
    }
    return {**values, **paths}


def comparable(config: Config) -> dict[str, Any]:
    """Returns the values that all hosts of a run must have in common, by key.

    A dataset or file may lie in another folder on each host. So of such paths only
    whether there is one counts; what is in them is compared later.
    """
    values = flatten(json.loads(config.to_json()))
    return {
        key: bool(value) if row_of(key) in _PATHS else value
        for key, value in values.items()
        if not key.startswith("tfds_")
    }
