"""Parameters to and from the safetensors files of PyTorch's timm.

The numbers carry over exactly; the activation does not. timm's Mixer computes the exact
erf GELU, the published one a tanh approximation, up to 5e-4 apart at each activation.
So run parameters from timm with `MlpMixer(..., gelu=timm_gelu(path))`, and expect timm
to return slightly other logits for parameters that were trained with "tanh".
"""

import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from absl import logging
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixer_jax.files import replace_when_whole
from mixer_jax.weights import layout, npz

_NORMS = {"LayerNorm_0": "norm1", "LayerNorm_1": "norm2"}
_DENSES = {
    "token_mixing/Dense_0": "mlp_tokens.fc1",
    "token_mixing/Dense_1": "mlp_tokens.fc2",
    "channel_mixing/Dense_0": "mlp_channels.fc1",
    "channel_mixing/Dense_1": "mlp_channels.fc2",
}
# Axes of a timm weight as axes of a published kernel (OIHW to HWIO, and transposed
# matrices), and the way back.
_TO_PUBLISHED = {1: (0,), 2: (1, 0), 4: (2, 3, 1, 0)}
_TO_TIMM = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def load_timm(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the parameters of a timm Mixer.

    Args:
      path: a safetensors file of a Mixer's state dict, such as the model.safetensors
        of timm/mixer_b16_224.goog_in21k.

    Returns:
      The published parameter tree, a nested dict of float32 numpy arrays. `infer_model`
      tells its sizes, `timm_gelu` which GELU to run it with.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no file.
      CheckpointError: it is no sound safetensors file, not float32, not finite, or not
        a whole Mixer.
    """
    params = {}
    with _open(path) as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118
        keys = {_timm_name(key): key for key in _published_keys(dtypes)}
        wrong = [f"{x}: missing" for x in sorted(keys.keys() - dtypes.keys())]
        wrong += [f"{x}: unknown" for x in sorted(dtypes.keys() - keys.keys())]
        wrong += [
            f"{x}: {dtype}, expected F32; convert it knowingly"
            for x, dtype in dtypes.items()
            if dtype != "F32"
        ]
        if wrong:
            raise layout.CheckpointError(
                "\n  ".join([f"{path} is not a timm Mixer in float32:", *wrong])
            )
        for name, key in keys.items():
            array = file.get_tensor(name)
            npz.check_values(array, f"{path}: {name}")
            axes = _TO_PUBLISHED.get(array.ndim, range(array.ndim))
            params[key] = np.ascontiguousarray(array.transpose(axes))
    layout.infer_sizes({key: x.shape for key, x in params.items()}, str(path))
    return layout.unflatten(params)


def timm_gelu(path: str | os.PathLike[str]) -> str:
    """Returns the GELU that the parameters in a safetensors file were trained with.

    That is "erf", as in timm, unless save_timm noted otherwise in the file.

    Raises:
      FileNotFoundError, IsADirectoryError, CheckpointError: as load_timm.
    """
    with _open(path) as file:
        return (file.metadata() or {}).get("gelu", "erf")


def save_timm(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    gelu: str = "tanh",
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes parameters for timm: whole or not at all.

    Load them with `timm.create_model("mixer_b16_224", checkpoint_path=path)` and its
    like. The metadata and a log message say that timm will compute the erf GELU.

    Args:
      path: the safetensors file, used as given; folders above it are made.
      params: the published parameter tree, of float32 JAX or numpy arrays.
      gelu: what the parameters were trained with, "tanh" or "erf".
      metadata: more text to keep in the file.

    Raises:
      TypeError: `params` is no nested dict of arrays.
      CheckpointError: they are not a Mixer's, not float32, not finite, or `path` is a
        URL.
      ValueError: `gelu` is unknown.
    """
    if gelu not in ("tanh", "erf"):
        raise ValueError(f"gelu is {gelu!r}, expected 'tanh' or 'erf'.")
    layout.infer_model(params)
    note = (
        f"timm computes the exact erf GELU; these parameters were trained with {gelu}."
    )
    if gelu == "tanh":
        note += " Activations differ by up to 5e-4, and so logits slightly."
    state_dict = {}
    for key, value in layout.flatten(params).items():
        array = np.asarray(value)
        npz.check_values(array, f"{path}: not written. {key}")
        state_dict[_timm_name(key)] = np.ascontiguousarray(
            array.transpose(_TO_TIMM[array.ndim])
        )
    with replace_when_whole(path) as partial:
        # "pt" is what PyTorch's programs look for.
        about = {"format": "pt", "gelu": gelu, "note": note, **(metadata or {})}
        partial.touch()
        mode = partial.stat().st_mode
        save_file(state_dict, partial, metadata=about)
        partial.chmod(mode)  # safetensors keeps everyone but the owner from reading
    logging.info("%s: %s", path, note)


def _open(path: str | os.PathLike[str]) -> Any:
    if pathlib.Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a safetensors file.")
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        raise layout.CheckpointError(
            f"{path} is no whole safetensors file ({error}). Fetch or copy it again; "
            "npz files are read by mixer_jax.load_checkpoint, pickles never."
        ) from error


def _published_keys(names: Mapping[str, Any]) -> list[str]:
    """Returns the keys of a Mixer with as many blocks, and a head if, as in `names`."""
    blocks = [re.match(r"blocks\.(0|[1-9]\d{0,3})\.", name) for name in names]
    sizes = layout.MixerSizes(  # only the keys of these shapes matter
        patch_size=(1, 1),
        num_blocks=1 + max((int(x[1]) for x in blocks if x), default=0),
        hidden_dim=1,
        tokens_mlp_dim=1,
        channels_mlp_dim=1,
        num_tokens=1,
        num_classes=1 if any(name.startswith("head.") for name in names) else None,
    )
    return list(sizes.shapes())


def _timm_name(key: str) -> str:
    module, leaf = key.rsplit("/", 1)
    leaf = leaf.replace("kernel", "weight").replace("scale", "weight")
    if match := re.fullmatch(r"MixerBlock_(\d+)/(.*)", module):
        return f"blocks.{match[1]}.{(_NORMS | _DENSES)[match[2]]}.{leaf}"
    names = {"stem": "stem.proj", "pre_head_layer_norm": "norm", "head": "head"}
    return f"{names[module]}.{leaf}"
