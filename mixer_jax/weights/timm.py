"""Parameters of the Mixers of timm, a package of PyTorch.

The numbers carry over exactly; the activation does not. timm's Mixer computes the exact
erf GELU, the published one a tanh approximation, up to 5e-4 apart at each activation.
So run parameters from timm with `gelu="erf"`, and expect timm to return slightly other
logits for parameters that were trained with "tanh".
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from einops import rearrange

from mixer_jax.model import GELUS
from mixer_jax.weights import state_dict

logger = logging.getLogger(__name__)

# Axes of timm's weights and of ours, by their number: matrices and convolutions.
_AXES = {2: ("o i", "i o"), 4: ("o i h w", "h w i o")}
_SAME_AXES = ("...", "...")


def _to_ours(key: str, array: np.ndarray) -> np.ndarray:
    del key
    theirs, ours = _AXES.get(array.ndim, _SAME_AXES)
    return rearrange(array, f"{theirs} -> {ours}")


def _to_theirs(key: str, array: np.ndarray) -> np.ndarray:
    del key
    theirs, ours = _AXES.get(array.ndim, _SAME_AXES)
    return rearrange(array, f"{ours} -> {theirs}")


TIMM = state_dict.Package(
    "timm", {"gelu": "erf", "layer_norm_epsilon": 1e-6}, _to_ours, _to_theirs
)


def save_timm(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    gelu: str = "tanh",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes parameters for timm: whole or not at all.

    Read them in PyTorch with, for example,
    `timm.create_model("mixer_b16_224", checkpoint_path=path)`. The file's metadata say
    that timm computes the erf GELU; if that changes the logits, so does a warning.

    Args:
      path: the safetensors file, used as given; folders above it are made.
      params: the published parameter tree, of float32 JAX or numpy arrays.
      gelu: the GELU that the parameters were trained with, "tanh" or "erf".
      metadata: more text to keep in the file.

    Raises:
      ValueError: `gelu` is unknown.
      TypeError, CheckpointError, FileError: as `save_state_dict`.
    """
    if gelu not in GELUS:
        raise ValueError(f"gelu is {gelu!r}, expected {' or '.join(GELUS)}.")
    note = (
        f"timm computes the exact erf GELU; these parameters were trained with {gelu}."
    )
    if gelu == "tanh":
        note += " Activations differ by up to 5e-4, and logits slightly."
    header = {"gelu": gelu, "note": note, **(metadata or {})}
    state_dict.save_state_dict(path, params, TIMM, header)
    if gelu == "tanh":
        logger.warning("%s: %s", path, note)
