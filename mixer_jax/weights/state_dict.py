"""State dicts of PyTorch's packages in safetensors files, read and written."""

import json
import logging
import os
import pathlib
import re
import shlex
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import ml_dtypes  # noqa: F401  # gives NumPy the bfloat16 of safetensors
import numpy as np
from einops import EinopsError
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from mixer_jax.files import replace_when_whole
from mixer_jax.weights import contents, layout, names, npz

logger = logging.getLogger(__name__)

_MAX_AXES = 8  # of an array; numpy has none of more than 64
_DTYPES = {"F32", "F16", "BF16"}


class Package(NamedTuple):
    """A package of PyTorch with a Mixer.

    Attributes:
      name: one of `mixer_jax.weights.names.PACKAGES`.
      fields: those of MlpMixer that the package fixes.
      to_ours: makes the published array of a published key and the package's array.
      to_theirs: the other way.
    """

    name: str
    fields: Mapping[str, Any]
    to_ours: Callable[[str, np.ndarray], np.ndarray]
    to_theirs: Callable[[str, np.ndarray], np.ndarray]


class Header(NamedTuple):
    """What a safetensors file says of itself, without its arrays.

    Attributes:
      package: whose state dict it is.
      names: of the arrays in the file, by published key.
      metadata: the texts in the file.
    """

    package: Package
    names: dict[str, str]
    metadata: dict[str, str]


def read_header(path: str | os.PathLike[str], packages: Collection[Package]) -> Header:
    """Tells whose state dict a safetensors file holds, by the names in it.

    Args:
      path: the file.
      packages: those that it may be of.

    Raises:
      FileNotFoundError, IsADirectoryError: there is no file.
      CheckpointError: it is no sound safetensors file, or not a whole Mixer.
    """
    with _open(path) as file:
        found = _without_wrappers(str(path), file.keys())
        metadata = dict(file.metadata() or {})
        for name in file.keys():  # noqa: SIM118 - it is no dict
            num_axes = len(file.get_slice(name).get_shape())
            if num_axes > _MAX_AXES:
                raise layout.CheckpointError(
                    f"{path}: {name} has {num_axes} axes, expected at most {_MAX_AXES}."
                )
    key = "MixerBlock_0/token_mixing/Dense_0/kernel"
    usual = {names.pytorch_names(x.name, 1, False)[key]: x for x in packages}
    package = next((x for name, x in usual.items() if name in found), None)
    if package is None:
        raise layout.no_mixer(found, str(path), " or ".join(map(repr, usual)))
    num_blocks = names.count_blocks(package.name, found)
    expected = names.pytorch_names(package.name, num_blocks, with_head=True)
    if not any(name in found for key, name in expected.items() if names.is_head(key)):
        expected = names.pytorch_names(package.name, num_blocks, with_head=False)
    wanted = set(expected.values())
    wrong = [f"{x}: missing" for x in sorted(wanted - found.keys())]
    wrong += [f"{x}: unknown" for x in sorted(found.keys() - wanted)]
    if wrong:
        about = f"{path} is not a Mixer of {package.name}:"
        raise layout.CheckpointError(layout.listed(about, wrong))
    return Header(package, {k: found[x] for k, x in expected.items()}, metadata)


def read_params(path: str | os.PathLike[str], header: Header) -> dict[str, Any]:
    """Reads the parameters in a file, whose header has been read.

    Returns:
      The published parameter tree, a nested dict of float32 numpy arrays. Those in
      float16 or bfloat16 are widened, which a log line says.

    Raises:
      CheckpointError: an array is of another dtype or shape, or not finite.
    """
    params, narrow = {}, []
    with _open(path) as file:
        for key, name in header.names.items():
            code = file.get_slice(name).get_dtype()
            if code not in _DTYPES:
                raise layout.CheckpointError(
                    f"{path}: {name} is {code}, expected F32 (float32), F16 or BF16. "
                    "If that is meant, convert all of them:\n  "
                    + _conversion(pathlib.Path(path))
                )
            array = file.get_tensor(name)
            if code != "F32":
                narrow.append(str(array.dtype))
                array = array.astype(np.float32)
            npz.check_values(array, f"{path}: {name}")
            try:
                array = header.package.to_ours(key, array)
            except (ValueError, EinopsError) as error:
                raise layout.CheckpointError(
                    f"{path}: {name} has the shape {array.shape}, which is not that of "
                    f"a Mixer of {header.package.name}. {error}"
                ) from error
            params[key] = np.ascontiguousarray(array)
    npz.log_widening(str(path), narrow, len(params))
    return layout.unflatten(params)


def peek_shapes(path: str | os.PathLike[str], header: Header) -> layout.Shapes:
    """Returns the shapes of the parameters in a file, of which none is read.

    Where it is not a Mixer's, the file is read and refused as in read_params.
    """
    shapes = {}
    with _open(path) as file:
        for key, name in header.names.items():
            shape = file.get_slice(name).get_shape()
            array = np.broadcast_to(np.float32(0), shape)  # takes no memory
            try:
                shapes[key] = header.package.to_ours(key, array).shape
            except (ValueError, EinopsError):
                return layout.shapes_of(read_params(path, header))
    return shapes


def save_state_dict(
    path: str | os.PathLike[str],
    params: Mapping[str, Any],
    package: Package,
    metadata: Mapping[str, str],
) -> None:
    """Writes parameters for a package: whole or not at all.

    Args:
      path: the safetensors file, used as given; folders above it are made.
      params: the published parameter tree, of float32 JAX or numpy arrays.
      package: the package.
      metadata: text to keep in the file.

    Raises:
      TypeError: `params` is no nested dict of arrays.
      CheckpointError: `params` are not those of a published Mixer, for example of a
        changed model; or they are not float32 or not finite; or the package has no
        such Mixer.
      FileError: `path` is a URL.
    """
    flat = layout.flatten(params)
    if wrong := names.differences(flat):
        about = (
            f"{path}: not written. The Mixer of {package.name} has the published "
            "parameters only:"
        )
        raise layout.CheckpointError(layout.listed(about, wrong))
    sizes = layout.infer_model(params)
    with_head = sizes.num_classes is not None
    theirs = names.pytorch_names(package.name, sizes.variant.num_blocks, with_head)
    tensors = {}
    for key, value in flat.items():
        array = np.asarray(value)
        npz.check_values(array, f"{path}: not written. {key}")
        try:
            array = package.to_theirs(key, array)
        except ValueError as error:
            raise layout.CheckpointError(f"{path}: not written. {error}") from error
        tensors[theirs[key]] = np.ascontiguousarray(array)
    with replace_when_whole(path) as partial:
        partial.touch()
        mode = partial.stat().st_mode
        # "pt" is what PyTorch's programs look for.
        save_file(tensors, partial, metadata={"format": "pt", **metadata})
        partial.chmod(mode)  # safetensors lets only the owner read


def _open(path: str | os.PathLike[str]) -> Any:
    if pathlib.Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder, expected a safetensors file.")
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file.")
    try:
        return safe_open(path, framework="numpy")
    except SafetensorError as error:
        kind = contents.kind_of_file(pathlib.Path(path))
        if kind is None or kind.startswith("a safetensors"):
            kind = f"cut off or damaged ({error!s:.200}). Fetch or copy it again."
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
        'import safetensors.numpy as s; s.save_file({k: v.astype("float32") '
        f"for k, v in s.load_file({source}).items()}}, {target})"
    )
    return f"python -c {shlex.quote(code)}"
