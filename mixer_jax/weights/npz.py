"""Checkpoints as npz files: both published layouts are read, the newer is written."""

import os
import pathlib
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from mixer_jax.files import replace_when_whole
from mixer_jax.weights import layout

# Pieces of keys in the older layout, which big_vision loads too.
_OLDER_KEYS = {
    r"^embedding/": "stem/",
    r"^Mixer/encoder_norm/": "pre_head_layer_norm/",
    r"^Mixer/encoderblock_": "MixerBlock_",
    r"_mixing_phase_0/(kernel|bias)1$": r"_mixing/Dense_0/\1",
    r"_mixing_phase_0/(kernel|bias)2$": r"_mixing/Dense_1/\1",
}


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a Mixer's parameters from an npz file, without ever unpickling.

    Args:
      path: a file in the published layout, or in the older one.

    Returns:
      The published parameter tree, a nested dict of float32 numpy arrays.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no file.
      CheckpointError: the file is cut off or damaged, pickled, of another dtype than
        float32, not finite, or not a whole Mixer; the message says which and where.
    """
    arrays = dict(_read_arrays(pathlib.Path(path)))
    layout.infer_sizes({key: x.shape for key, x in arrays.items()}, str(path))
    return layout.unflatten(arrays)


def inspect_checkpoint(path: str | os.PathLike[str]) -> layout.MixerSizes:
    """Reads the whole of a file as read_checkpoint does, but keeps one array at a time.

    Returns:
      The sizes of the model that the file holds.

    Raises:
      FileNotFoundError, IsADirectoryError, CheckpointError: as read_checkpoint.
    """
    shapes = {key: array.shape for key, array in _read_arrays(pathlib.Path(path))}
    return layout.infer_sizes(shapes, str(path))


def save_checkpoint(path: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
    """Writes parameters as an npz file in the published layout: whole or not at all.

    A changed model may have parameters of its own beside the published ones; reading
    the file wants them listed in `mixer_jax.weights.layout.MixerSizes.shapes`.

    Args:
      path: the file, used as given; folders above it are made.
      params: the published parameter tree, of float32 JAX or numpy arrays.

    Raises:
      TypeError: `params` is no nested dict of arrays.
      CheckpointError: they are not a Mixer's, not float32, not finite, or `path` is a
        URL.
    """
    layout.infer_sizes(layout.shapes_of(params), "The parameters", more=True)
    with replace_when_whole(path) as partial, partial.open("wb") as file:
        arrays = {key: np.asarray(x) for key, x in layout.flatten(params).items()}
        for key, array in arrays.items():
            check_values(array, f"{path}: not written. {key}")
        np.savez(file, allow_pickle=False, **arrays)


def merge_pretrained(
    init_params: Mapping[str, Any], params: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Returns `init_params` with the values of `params` everywhere but in the head.

    Args:
      init_params: the tree of the new model. Of all but the head only shapes are read,
        so that jax.eval_shape's result will do with a real head put in.
      params: the published parameter tree to take values from, with any head or none.
      where: what begins the message of an error: the file `params` are from.

    Raises:
      CheckpointError: a key other than the head's is missing, unknown or misshapen, or
        `init_params` are not a Mixer's.
    """
    layout.check_is_mixer(layout.flatten(init_params), "init_params")
    found, expected = (
        {k: x for k, x in layout.shapes_of(tree).items() if not k.startswith("head/")}
        for tree in (params, init_params)
    )
    layout.check_shapes(
        found,
        expected,
        f"{where} does not fit the model. {_explain(params, init_params)}",
    )
    flat = layout.flatten(params)
    return layout.unflatten(
        {
            key: flat[key] if key in expected else head
            for key, head in layout.flatten(init_params).items()
        }
    )


def _explain(params: Mapping[str, Any], init_params: Mapping[str, Any]) -> str:
    """Says in a few words why the sizes of two trees differ."""
    found = layout.infer_model(params)
    try:
        wanted = layout.infer_model(init_params)
    except (
        layout.CheckpointError
    ):  # a fork with parameters of its own: the keys must do
        return f"The file holds a {found}"
    why = f"The file holds a {found}; the model is a {wanted}"
    if found.num_tokens != wanted.num_tokens and found.patch_size == wanted.patch_size:
        size = "{}x{} pixels".format(*found.image_size or ("?", "?"))
        why += (
            ". Token mixing fixes the number of tokens, and so the size of the images: "
            f"initialise the model on images of {size}"
        )
    return why


def check_values(array: Any, where: str) -> None:
    """Raises a CheckpointError that begins with `where` unless `array` is sound."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        found = getattr(array, "dtype", type(array).__name__)
        raise layout.CheckpointError(
            f"{where} is {found}, expected float32. Convert it knowingly: "
            "array.astype('float32')."
        )
    # The sum is quick and makes no array; it is exact only as to what is not finite,
    # and may overflow, so that a bad sum asks for a closer look.
    with np.errstate(over="ignore", invalid="ignore"):
        total = array.sum()
    if not np.isfinite(total) and not (finite := np.isfinite(array)).all():
        raise layout.CheckpointError(
            f"{where} has {array.size - np.count_nonzero(finite)} NaN or infinite "
            f"values among {array.size}. The parameters are of no use: take another "
            "copy of the file, or a checkpoint from before training diverged."
        )


def _read_arrays(path: pathlib.Path) -> Iterator[tuple[str, np.ndarray]]:
    """Yields published keys and arrays, each checked by itself."""
    with _open(path) as file:
        keys = {name: _published_key(name) for name in file.files}
        layout.check_is_mixer(dict.fromkeys(keys.values()), str(path))
        for name, key in keys.items():
            try:
                array = file[name]
            except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as e:
                raise layout.CheckpointError(
                    f"{path}: {name} cannot be read ({e}). Either the file is damaged, "
                    "and another copy is needed, or it holds pickled objects, which "
                    "are refused since loading them could run any code."
                ) from e
            check_values(array, f"{path}: {name}")
            if key != name and "_mixing/" in key:
                array = _squeeze(array, rank=2 if key.endswith("kernel") else 1)
            yield key, array


def _open(path: pathlib.Path) -> Any:
    """Opens an npz file lazily, or says what the path is instead."""
    if path.is_dir():
        raise IsADirectoryError(
            f"{path} is a folder, expected an npz file. In it: "
            f"{', '.join(sorted(x.name for x in path.glob('*.npz'))) or 'no npz files'}"
        )
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file.")
    with path.open("rb") as file:
        start = file.read(2)
    try:
        if zipfile.is_zipfile(path):
            return np.load(path, allow_pickle=False)
        problem = "it ends before its table of contents"
    except (ValueError, zipfile.BadZipFile) as e:
        problem = str(e)
    if not start:
        raise layout.CheckpointError(f"{path} is empty. Fetch or copy the file again.")
    if start == b"PK":
        raise layout.CheckpointError(
            f"{path} of {path.stat().st_size:,} bytes is cut off or damaged: "
            f"{problem}. Fetch or copy the file again."
        )
    raise layout.CheckpointError(
        f"{path} is no npz file (a zip archive of arrays): it begins with {start!r}. "
        "For safetensors there is mixer_jax.weights.timm; pickles are never read."
    )


def _published_key(key: str) -> str:
    for pattern, replacement in _OLDER_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


def _squeeze(array: np.ndarray, rank: int) -> np.ndarray:
    """Drops axes of size 1, the first ones first, down to `rank` axes."""
    while array.ndim > rank and 1 in array.shape:
        array = array.squeeze(array.shape.index(1))
    return array
