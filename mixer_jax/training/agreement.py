"""What all processes of a run must have in common, compared before it matters.

Processes whose programs differ wait for each other for ever, or train parameters that
are neither's.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from mixer_jax.training.processes import current
from mixer_jax.training.stopping import ProcessError, process_names

_PACKAGES = (
    "flax",
    "grain",
    "jax",
    "jaxlib",
    "numpy",
    "opencv-python-headless",
    "optax",
    "orbax-checkpoint",
    "pillow",
)

# The settings of JAX that change numbers or programs.
_SETTINGS = (
    "jax_enable_x64",
    "jax_default_matmul_precision",
    "jax_default_prng_impl",
    "jax_threefry_partitionable",
    "jax_numpy_dtype_promotion",
    "jax_disable_jit",
    "jax_debug_nans",
    "jax_debug_infs",
)

_MOST_LINES = 20


def check_same(what: str, values: Mapping[str, Any]) -> None:
    """Raises ProcessError in all processes if they have different values.

    All processes call it, in the same order.

    Args:
      what: the values are, such as "the config", for messages.
      values: by name; of types that JSON has.
    """
    watch = current()
    if watch is None:
        return
    mine = {key: json.dumps(x, sort_keys=True) for key, x in values.items()}
    name = f"to compare {what}"
    (text,) = watch.collect(name, json.dumps(mine), senders=[0])
    first = json.loads(text)
    keys = sorted(key for key in first | mine if mine.get(key) != first.get(key))
    # As all sort, the first keys of all are among the first keys of each.
    differing = {key: _short(mine.get(key, "absent")) for key in keys[:_MOST_LINES]}
    answers = watch.collect(name, json.dumps([len(keys), differing]))
    counts, others = zip(*map(json.loads, answers), strict=True)
    keys = sorted({key for differing in others for key in differing})
    if not keys:
        return
    lines = []
    for key in keys[:_MOST_LINES]:
        who: dict[str, list[int]] = {}
        for index, differing in enumerate(others):
            value = differing.get(key, _short(first.get(key, "absent")))
            who.setdefault(value, []).append(index)
        listed = [f"{value} in {process_names(x)}" for value, x in who.items()]
        lines.append(f"  {key}: {'; '.join(listed)}")
    count = max(len(keys), *counts)  # more, if each process differs in other keys
    if count > _MOST_LINES:
        lines.append(f"  and at least {count - _MOST_LINES} more")
    raise ProcessError(
        "\n".join([f"The processes of this run differ in {what}:", *lines])
        + "\nStart all of them with the same command, code, versions and data."
    )


def check_processes(config: Mapping[str, Any]) -> None:
    """Raises ProcessError in all processes if one would run another program.

    Args:
      config: the values that must be equal, by key.
    """
    watch = current()
    if watch is None:
        return
    check_same("the config", {"num_processes": watch.count, **config})
    check_same("the installed versions", versions())
    check_same("the code", _code())
    check_same("the settings of JAX", _settings())
    watch.doing = "starting the devices of all processes"
    devices = {"platform": jax.default_backend(), "devices": jax.local_device_count()}
    check_same("the devices of each process", devices)


def describe_arrays(tree: Any) -> dict[str, str]:
    """Returns the dtypes and shapes of a tree of arrays by their names."""
    return {
        _name(path): f"{x.dtype}{x.shape}"
        for path, x in jax.tree_util.tree_leaves_with_path(tree)
    }


def check_same_copies(what: str, tree: Any) -> None:
    """Raises ProcessError in all processes if their copies of an array differ.

    So it finds files that are not the same on all hosts. Arrays of which each process
    holds another part are left out.

    Args:
      what: see `check_same`.
      tree: of arrays, on the devices of all processes.
    """
    if current() is not None:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        check_same(
            what,
            {
                _name(path): _digest(np.asarray(x.addressable_data(0)).tobytes())
                for path, x in leaves
                if x.is_fully_replicated
            },
        )


def versions(packages: Iterable[str] = _PACKAGES) -> dict[str, str]:
    """Returns the versions of Python and of packages."""
    found = {"Python": platform.python_version()}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # such as another opencv
            found[name] = "not installed"
    return found


def _code() -> dict[str, str]:
    """Returns a digest of each module, so that a difference names the file."""
    package = pathlib.Path(__file__).parents[1]
    return {
        str(path.relative_to(package.parent)): _digest(path.read_bytes())
        for path in sorted(package.rglob("*.py"))
    }


def _settings() -> dict[str, Any]:
    flags = os.environ.get("XLA_FLAGS", "").split()
    flags += os.environ.get("LIBTPU_INIT_ARGS", "").split()
    kept = sorted(x for x in flags if not x.startswith("--xla_dump"))
    settings = {name: str(getattr(jax.config, name)) for name in _SETTINGS}
    return settings | {"XLA_FLAGS and LIBTPU_INIT_ARGS": " ".join(kept)}


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _digest(contents: bytes) -> str:
    return hashlib.blake2b(contents, digest_size=8).hexdigest()


def _short(value: str) -> str:
    return value if len(value) <= 60 else f"{value[:57]}…"
