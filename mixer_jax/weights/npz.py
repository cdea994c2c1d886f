"""Parameters as npz files: both published layouts are read, the newer is written."""

import json
import logging
import os
import pathlib
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mixer_jax.files import replace_when_whole
from mixer_jax.weights import archive, layout, names, resolution
from mixer_jax.weights.about import beside

logger = logging.getLogger(__name__)

# Pieces of keys in the older layout, which big_vision loads too.
_OLDER_KEYS = {
    r"^embedding/": "stem/",
    r"^Mixer/encoder_norm/": "pre_head_layer_norm/",
    r"^Mixer/encoderblock_": "MixerBlock_",
    r"_mixing_phase_0/(kernel|bias)1$": r"_mixing/Dense_0/\1",
    r"_mixing_phase_0/(kernel|bias)2$": r"_mixing/Dense_1/\1",
}

_DEEPEST = 50  # words in a key


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads the parameters in an npz file, of any model, without ever unpickling.

    Args:
      path: a file in the published layout, or in the older one.

    Returns:
      A nested dict of float32 numpy arrays, with the keys of the published layout.
      Arrays in float16 or bfloat16 are widened, which a log line says.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no file.
      CheckpointError: the file is cut off, damaged or of another program, or an array
        is pickled, of another dtype or not finite. The message says which and where.
    """
    return layout.unflatten(dict(_read_arrays(pathlib.Path(path))))


def read_shapes(path: str | os.PathLike[str]) -> layout.Shapes:
    """Reads and checks the whole file as read_checkpoint does, one array at a time."""
    return {key: array.shape for key, array in _read_arrays(pathlib.Path(path))}


def peek_shapes(path: str | os.PathLike[str]) -> layout.Shapes:
    """Returns the shapes of the parameters in an npz file, of which none is read."""
    with archive.open_npz(pathlib.Path(path)) as file:
        return {key: _published_shape(x) for key, x in _by_key(path, file).items()}


def save_checkpoint(path: str | os.PathLike[str], params: Mapping[str, Any]) -> None:
    """Writes the parameters of any model as an npz file: whole or not at all.

    A JSON file beside it, which tells of the parameters that were there before, is
    removed. See `mixer_jax.weights.about.write_beside`.

    Args:
      path: the file, used as given; folders above it are made.
      params: a nested dict of float32 JAX or numpy arrays, the tree below "params".

    Raises:
      TypeError: `params` is no nested dict of arrays.
      CheckpointError: `params` are empty or a whole state; an array is not float32 or
        not finite.
      FileError: `path` is a URL.
    """
    arrays = {key: np.asarray(x) for key, x in layout.flatten(params).items()}
    if not arrays or list(params) == ["params"]:
        raise layout.CheckpointError(
            f"{path}: not written. Found {', '.join(params) or 'no parameters'}, "
            "expected the tree of parameters below 'params'."
        )
    for key, array in arrays.items():
        check_values(array, f"{path}: not written. {key}")
    with replace_when_whole(path) as partial, partial.open("wb") as file:
        np.savez(file, allow_pickle=False, **arrays)
    beside(path).unlink(missing_ok=True)


def merge_pretrained(
    init_params: Mapping[str, Any], params: Mapping[str, Any], where: str
) -> dict[str, Any]:
    """Returns a new model's parameters with the values of a file, but for the head.

    The model may differ from the file's. Parameters that only the model has, and that
    are no published Mixer's, stay as they are. Published ones that the model no longer
    has are left out. A log line names each kind.

    Args:
      init_params: the parameters of the new model. Of those that the file has only the
        shapes are read, so jax.ShapeDtypeStruct will do there.
      params: the parameters to take, with any head or none.
      where: how the message of an error begins: the file that `params` are from.

    Returns:
      The tree of `init_params`.

    Raises:
      CheckpointError: a shape differs; the file lacks a published parameter that the
        model has; the model lacks one that is not published, or whole blocks; or
        nothing fits. Every key at fault is named.
    """
    model, file = (
        {k: x for k, x in layout.flatten(tree).items() if not names.is_head(k)}
        for tree in (init_params, params)
    )
    new = [k for k in model if k not in file and not names.is_published(k)]
    blocks = {None, *map(names.block_of, model)}  # None: the keys of no block
    left_out = [
        key
        for key in file
        if key not in model
        and names.is_published(key)
        # A block that only the model lacks is an error: the depths differ.
        and (names.block_of(key) in blocks or blocks == {None})
    ]
    found = {k: tuple(x.shape) for k, x in file.items() if k not in left_out}
    expected = {k: tuple(x.shape) for k, x in model.items() if k not in new}
    message = f"{where} does not fit the model."
    if not expected:
        raise layout.no_mixer(model, f"{message} init_params")
    layout.check_shapes(found, expected, f"{message} {_explain(file, model)}")
    if new:
        logger.info("new      %s: not in %s", _listed(new), where)
    if left_out:
        logger.info("left out %s: not in the model", _listed(left_out))
    return layout.unflatten(
        {
            key: file[key] if key in expected else value
            for key, value in layout.flatten(init_params).items()
        }
    )


def _listed(keys: Iterable[str]) -> str:
    """Names keys, those of several blocks at once."""
    counts = Counter(names.in_block(key, "*") for key in keys)
    return ", ".join(f"{n} x {key}" if "*" in key else key for key, n in counts.items())


def _explain(file: Mapping[str, Any], model: Mapping[str, Any]) -> str:
    """Says what the file holds, and why the model differs, if that can be inferred."""
    found_shapes, shapes = (
        {key: tuple(x.shape) for key, x in flat.items()} for flat in (file, model)
    )
    try:
        found = layout.infer_sizes(found_shapes, "The file")
    except layout.CheckpointError as error:  # of another program, or a changed model
        return str(error)
    try:
        wanted = layout.infer_sizes(shapes, "The model")
    except layout.CheckpointError:  # a changed model
        return f"The file holds a {found}."
    why = f"The file holds a {found}; the model is a {wanted}."
    same_patches = found.variant.patches == wanted.variant.patches
    if found.num_tokens != wanted.num_tokens and same_patches:
        size = found.image_size
        images = "{}x{} pixels".format(*size) if size else f"{found.num_tokens} patches"
        why += (
            " Token mixing fixes the number of tokens, and so the size of the images: "
            f"initialise the model on images of {images}, or have the parameters "
            "adapted. In a run: --config.pp.crop="
        )
        crop = size[0] if size and size[0] == size[1] else size or "HEIGHT,WIDTH"
        why += f"{crop}.".replace(" ", "")
    if found.num_tokens != wanted.num_tokens or not same_patches:
        why += resolution.explain(found, wanted)
    return why


def check_values(array: Any, where: str) -> None:
    """Raises a CheckpointError that begins with `where` unless `array` is sound."""
    if not isinstance(array, np.ndarray) or array.dtype != np.float32:
        found = getattr(array, "dtype", type(array).__name__)
        raise layout.CheckpointError(
            f"{where} is {found}, expected float32. Convert it if that is "
            "meant: array.astype('float32')."
        )
    # The sum is quick and makes no array. It may overflow, so a sum that is not finite
    # asks for a closer look.
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
    narrow = []
    with archive.open_npz(path) as file:
        members = _by_key(path, file)
        for key, member in members.items():
            name = f"{member.name:.100}"
            dtype = member.dtype
            if dtype == "V2":  # what NumPy makes of bfloat16 in an npz file
                dtype = np.dtype(ml_dtypes.bfloat16)
            if dtype not in (np.float32, np.float16, ml_dtypes.bfloat16):
                raise layout.CheckpointError(
                    f"{path}: {name} is {dtype!s:.80}, expected float32, float16 or "
                    "bfloat16. If that is meant, convert all of them:\n  "
                    + _conversion(path)
                )
            array = file.read(member).view(dtype)
            if dtype != np.float32:
                narrow.append(str(dtype))
                array = array.astype(np.float32)
            check_values(array, f"{path}: {name}")
            yield key, array.reshape(_published_shape(member))
    log_widening(str(path), narrow, len(members))


def _by_key(path: Any, file: archive.Archive) -> dict[str, archive.Member]:
    """Returns the arrays of an open file by their published keys, or refuses them."""
    members = {_published_key(x.name): x for x in file.members}
    for member in file.members:
        key = _published_key(member.name)
        parts = key.split("/")
        above = ["/".join(parts[:i]) for i in range(1, min(len(parts), _DEEPEST))]
        if (
            members[key] is not member
            or len(parts) > _DEEPEST
            or "" in parts
            or any(x in members for x in above)
        ):
            raise layout.CheckpointError(
                f"{path}: {member.name:.100} cannot stand beside the other arrays: "
                "expected one for each key, such as stem/bias. Write the file again."
            )
    is_known = any(map(names.is_published, members))
    if not members or (layout.looks_like(members) and not is_known):
        raise layout.no_mixer(members, str(path))
    return members


def log_widening(where: str, dtypes: Sequence[str], count: int) -> None:
    """Says of a file with `count` arrays that those of other `dtypes` were widened."""
    if dtypes:
        listed = " and ".join(sorted(set(dtypes)))
        message = "%s: %d of %d arrays are in %s; they were widened to float32"
        logger.warning(message, where, len(dtypes), count, listed)


def _conversion(path: pathlib.Path) -> str:
    """Returns a command that writes the arrays of an npz file in float32."""
    source, target = map(
        json.dumps, (str(path), str(path.with_name(f"{path.stem}-float32.npz")))
    )
    code = (
        f"import numpy as np; f = np.load({source}); np.savez({target}, "
        '**{k: f[k].astype("float32") for k in f})'
    )
    return f"python -c {shlex.quote(code)}"


def _published_key(key: str) -> str:
    for pattern, replacement in _OLDER_KEYS.items():
        key = re.sub(pattern, replacement, key)
    return key


def _published_shape(member: archive.Member) -> tuple[int, ...]:
    """Drops axes that the older layout has more, of size 1: the first ones first."""
    key, shape = _published_key(member.name), list(member.shape)
    if key != member.name and "_mixing/" in key:
        rank = 2 if key.endswith("kernel") else 1
        while len(shape) > rank and 1 in shape:
            shape.remove(1)
    return tuple(shape)
