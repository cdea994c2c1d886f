"""Safetensors files of any of PyTorch's packages that are known here."""

import logging
import os
from collections.abc import Mapping
from typing import Any

from mixer_jax.weights.about import About, to_metadata
from mixer_jax.weights.mlp_mixer_pytorch import MLP_MIXER_PYTORCH
from mixer_jax.weights.state_dict import (
    Header,
    read_header,
    read_params,
    save_state_dict,
)
from mixer_jax.weights.timm import TIMM, save_timm

logger = logging.getLogger(__name__)

_PACKAGES = (TIMM, MLP_MIXER_PYTORCH)


def read_pytorch_header(path: str | os.PathLike[str]) -> Header:
    """Tells whose state dict a file holds; see `read_header`."""
    return read_header(path, _PACKAGES)


def read_pytorch(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the parameters in a file of any known package.

    Returns:
      The published parameter tree, a nested dict of float32 numpy arrays.

    Raises:
      FileNotFoundError, IsADirectoryError, CheckpointError: as `read_header` and
        `read_params`.
    """
    return read_params(path, read_pytorch_header(path))


def save_pytorch(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    package: str,
    about: About,
) -> None:
    """Writes parameters for a package: whole or not at all.

    The file's metadata say what is known of them. If the package computes something
    else than they were trained with, so does a warning.

    Args:
      path: the safetensors file, used as given; folders above it are made.
      params: the published parameter tree, of float32 JAX or numpy arrays.
      package: one of `mixer_jax.weights.names.PACKAGES`.
      about: what is known of the parameters.

    Raises:
      TypeError, CheckpointError, FileError: as `save_state_dict`.
    """
    fixed = {x.name: x for x in _PACKAGES}[package].fields
    metadata = to_metadata(about)
    if package == TIMM.name:  # it says what it computes itself
        save_timm(path, params, about.fields.get("gelu", fixed["gelu"]), metadata)
        fixed = {k: x for k, x in fixed.items() if k != "gelu"}
    else:
        save_state_dict(path, params, MLP_MIXER_PYTORCH, metadata)
    other = {k: about.fields.get(k, x) for k, x in fixed.items()}
    if other != fixed:
        message = "%s: %s computes with %s; these parameters were trained with %s"
        logger.warning(message, path, package, _listed(fixed), _listed(other))


def _listed(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())
