"""Parameters of the Mixers of mlp-mixer-pytorch, a package of PyTorch by lucidrains.

Its stem is a Linear over the pixels of a square patch, its token mixing a Conv1d. It
computes the exact erf GELU, and LayerNorm with an epsilon of 1e-5.
"""

import math

import numpy as np
from einops import rearrange

from mixer_jax.weights import state_dict


def _axes(key: str, ndim: int) -> tuple[str, str]:
    """Returns the axes of a weight there and here; one of norms and biases stays."""
    if ndim == 1:
        return "x", "x"
    if key == "stem/kernel":
        return "o (h w i)", "h w i o"
    return ("o i 1" if "/token_mixing/" in key else "o i"), "i o"


def _to_ours(key: str, array: np.ndarray) -> np.ndarray:
    theirs, ours = _axes(key, array.ndim)
    sides = {}
    if key == "stem/kernel":
        side = _patch_side(array.shape[-1])
        sides = {"h": side, "w": side}
    return rearrange(array, f"{theirs} -> {ours}", **sides)


def _to_theirs(key: str, array: np.ndarray) -> np.ndarray:
    if key == "stem/kernel" and array.shape[0] != array.shape[1]:
        height, width = array.shape[:2]
        raise ValueError(
            f"The model has patches of {height}x{width} pixels; mlp-mixer-pytorch has "
            "square ones only."
        )
    theirs, ours = _axes(key, array.ndim)
    return rearrange(array, f"{ours} -> {theirs}")


def _patch_side(values: int) -> int:
    """Returns the side of a square patch, in pixels, of so many values.

    Its pixels have 3 colours or 1: for both, no number of values is a square.
    """
    for channels in (3, 1):
        side = math.isqrt(values // channels)
        if channels * side * side == values:
            return side
    raise ValueError(f"{values} values of a patch are no square of pixels")


MLP_MIXER_PYTORCH = state_dict.Package(
    "mlp-mixer-pytorch",
    {"gelu": "erf", "layer_norm_epsilon": 1e-5},
    _to_ours,
    _to_theirs,
)
