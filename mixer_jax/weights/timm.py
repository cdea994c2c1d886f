"""Parameters to and from the safetensors files of PyTorch's timm.

The numbers carry over exactly; the activation does not. timm's Mixer computes the exact
erf GELU, the published one a tanh approximation, up to 5e-4 apart at each activation.
So run parameters from timm with `MlpMixer(..., gelu=timm_gelu(path))`, and expect timm
to return slightly other logits for parameters that were trained with "tanh".
"""

import json
import logging
import os
import pathlib
import re
import shlex
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from einops import rearrange
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixer_jax.files import replace_when_whole
from mixer_jax.model import GELUS
from mixer_jax.weights import contents, layout, names, npz

logger = logging.getLogger(__name__)

# Axes of timm's weights and of ours, by their number: matrices and convolutions.
_AXES = {2: ("o i", "i o"), 4: ("o i h w", "h w i o")}
_SAME_AXES = ("...", "...")


def load_timm(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the parameters of a timm Mixer.

    Args:
      path: a safetensors file of a Mixer's state dict, such as the model.safetensors
        of timm/mixer_b16_224.goog_in21k.

    Returns:
      The published parameter tree, a nested dict of float32 numpy arrays. `infer_model`
      returns its sizes, `timm_gelu` the GELU to run it with.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no file.
      CheckpointError: it is no sound safetensors file, not float32, not finite, or not
        a whole Mixer.
    """
    params = {}
    with _open(path) as file:
        found = _without_wrappers(str(path), file.keys())
        blocks = [re.match(r"blocks\.(0|[1-9]\d{0,3})\.", name) for name in found]
        num_blocks = 1 + max((int(x[1]) for x in blocks if x), default=0)
        with_head = any(name.startswith("head.") for name in found)
        keys = {
            names.timm_name(key): key
            for key in names.published_keys(num_blocks, with_head)
        }
        if not any(".mlp_tokens." in name for name in found):
            raise layout.no_mixer(found, str(path), "blocks.0.mlp_tokens.fc1.weight")
        wrong = [f"{x}: missing" for x in sorted(keys.keys() - found.keys())]
        wrong += [f"{x}: unknown" for x in sorted(found.keys() - keys.keys())]
        if wrong:
            raise layout.CheckpointError(
                "\n  ".join([f"{path} is not a timm Mixer:", *wrong])
            )
        for name, key in keys.items():
            dtype = file.get_slice(found[name]).get_dtype()
            if dtype != "F32":
                raise layout.CheckpointError(
                    f"{path}: {name} is {dtype}, expected F32 (float32). If that is "
                    "meant, convert all of them:\n  " + _conversion(pathlib.Path(path))
                )
            array = file.get_tensor(found[name])
            npz.check_values(array, f"{path}: {name}")
            theirs, ours = _AXES.get(array.ndim, _SAME_AXES)
            array = rearrange(array, f"{theirs} -> {ours}")
            params[key] = np.ascontiguousarray(array)
    nested = layout.unflatten(params)
    layout.infer_model(nested, str(path))
    return nested


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

    Read them in PyTorch with, for example,
    `timm.create_model("mixer_b16_224", checkpoint_path=path)`. The file's metadata say
    that timm computes the erf GELU; if that changes the logits, so does a warning.

    Args:
      path: the safetensors file, used as given; folders above it are made.
      params: the published parameter tree, of float32 JAX or numpy arrays.
      gelu: the GELU that the parameters were trained with, "tanh" or "erf".
      metadata: more text to keep in the file.

    Raises:
      TypeError: `params` is no nested dict of arrays.
      CheckpointError: `params` are not those of a published Mixer, for example of a
        changed model; or they are not float32 or not finite.
      FileError: `path` is a URL.
      ValueError: `gelu` is unknown.
    """
    if gelu not in GELUS:
        raise ValueError(f"gelu is {gelu!r}, expected {' or '.join(GELUS)}.")
    flat = layout.flatten(params)
    if wrong := names.differences(flat):
        about = f"{path}: not written. timm's Mixer has the published parameters only:"
        raise layout.CheckpointError("\n  ".join([about, *wrong]))
    layout.infer_model(params)
    note = (
        f"timm computes the exact erf GELU; these parameters were trained with {gelu}."
    )
    if gelu == "tanh":
        note += " Activations differ by up to 5e-4, and logits slightly."
    state_dict = {}
    for key, value in flat.items():
        array = np.asarray(value)
        npz.check_values(array, f"{path}: not written. {key}")
        theirs, ours = _AXES.get(array.ndim, _SAME_AXES)
        array = rearrange(array, f"{ours} -> {theirs}")
        state_dict[names.timm_name(key)] = np.ascontiguousarray(array)
    with replace_when_whole(path) as partial:
        # "pt" is what PyTorch's programs look for.
        header = {"format": "pt", "gelu": gelu, "note": note, **(metadata or {})}
        partial.touch()
        mode = partial.stat().st_mode
        save_file(state_dict, partial, metadata=header)
        partial.chmod(mode)  # safetensors lets only the owner read
    if gelu == "tanh":
        logger.warning("%s: %s", path, note)


def _open(path: str | os.PathLike[str]) -> Any:
    if pathlib.Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a safetensors file.")
    if not pathlib.Path(path).exists():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        kind = contents.kind_of_file(pathlib.Path(path))
        if kind is None or kind.startswith("a safetensors"):
            kind = f"cut off or damaged ({error}). Fetch or copy it again."
        raise layout.CheckpointError(
            f"{path} is no whole safetensors file but {kind}"
        ) from error


def _without_wrappers(path: str, keys: Collection[str]) -> dict[str, str]:
    """Maps names without those of PyTorch's wrappers to the names in a file.

    DataParallel puts "module." before all names, torch.compile "_orig_mod." before
    those of what it compiled, and a training program often the name of a field.
    """
    found = {re.sub(r"\b(module|_orig_mod)\.", "", key): key for key in keys}
    first = {name.partition(".")[0] for name in found}
    if len(first) == 1 and all("." in name for name in found):
        found = {name.partition(".")[2]: key for name, key in found.items()}
    if len(found) < len(keys):  # two names would be one
        return {key: key for key in keys}
    if wrapped := [key for name, key in found.items() if name != key]:
        logger.warning(
            "%s: left out what PyTorch's wrappers put into %d of %d names, as in %s",
            path,
            len(wrapped),
            len(keys),
            wrapped[0],
        )
    return found


def _conversion(path: pathlib.Path) -> str:
    """Returns a command that writes the arrays of a safetensors file in float32."""
    source, target = map(
        json.dumps, (str(path), str(path.with_name(f"{path.stem}-float32.safetensors")))
    )
    code = (
        'import ml_dtypes, safetensors.numpy as s; s.save_file({k: v.astype("float32") '
        f"for k, v in s.load_file({source}).items()}}, {target})"
    )
    return f"python -c {shlex.quote(code)}"
