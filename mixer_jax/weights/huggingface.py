"""Folders as the Hugging Face hub has them: config.json and model.safetensors.

timm writes such folders, and `timm.create_model("local-dir:FOLDER")` reads them. Their
config.json says what a file of parameters cannot: how images are cut and normalised,
and what the classes are called.
"""

import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from safetensors import safe_open

from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.data.sizes import size_text
from mixer_jax.files import read_json, replace_folder_when_whole
from mixer_jax.weights import layout
from mixer_jax.weights.about import About, to_metadata
from mixer_jax.weights.card import make_card, timm_arguments
from mixer_jax.weights.pytorch import read_pytorch_header
from mixer_jax.weights.state_dict import Header, read_header, save_state_dict
from mixer_jax.weights.timm import TIMM
from mixer_jax.weights.timm_config import (
    ARCHITECTURES,
    TIMM_GELUS,
    class_names_of,
    config_error,
    is_of_timm,
    make_config,
    read_config,
    transform_of,
)

CONFIG, PARAMETERS, CARD = "config.json", "model.safetensors", "README.md"
_WRITTEN_BY = ("written_by", "mixer_jax")  # in config.json: such a folder is replaced

logger = logging.getLogger(__name__)


class FolderConfig(NamedTuple):
    """What the config.json of a folder says of a model.

    Attributes:
      fields: fields of MlpMixer beside its sizes.
      transform: makes the images that the model expects; None if that is not said.
      class_names: what the logits stand for; None if that is not said.
    """

    fields: dict[str, Any]
    transform: EvalTransform | None
    class_names: list[str] | None


def is_folder(path: str | os.PathLike[str]) -> bool:
    """Returns whether a path is a folder with a config.json and a model.safetensors."""
    return all((pathlib.Path(path) / name).is_file() for name in (CONFIG, PARAMETERS))


def folder_of(path: str | os.PathLike[str]) -> pathlib.Path | None:
    """Returns the folder that a path stands for; None if it stands for none.

    A model.safetensors stands for its folder, if timm's config.json is beside it.
    """
    path = pathlib.Path(path)
    if path.is_dir():
        return path if is_folder(path) else None
    if path.name == PARAMETERS and is_folder(path.parent):
        return path.parent if is_of_timm(path.parent / CONFIG) else None
    return None


def read_folder_config(folder: str | os.PathLike[str]) -> FolderConfig:
    """Reads what the config.json of a folder says of its parameters, and checks it.

    What timm's config.json leaves out is as in timm. A config.json without the key
    "architecture" is not timm's; of that nothing is read.

    Args:
      folder: holds config.json and model.safetensors.

    Raises:
      FileNotFoundError: one of the two is missing.
      CheckpointError: config.json is damaged, of another model, or not supported; or
        it contradicts model.safetensors; or that is damaged. The message says which
        key, what was found and what was expected.
    """
    folder = pathlib.Path(folder)
    path = folder / CONFIG
    config = read_config(path)
    if not config:
        header = read_pytorch_header(folder / PARAMETERS)
        return FolderConfig(dict(header.package.fields), None, None)
    header = read_header(folder / PARAMETERS, [TIMM])
    shapes = _shapes(folder / PARAMETERS, header)
    gelu = header.metadata.get("gelu", TIMM.fields["gelu"])
    if act_layer := config.get("model_args.act_layer"):
        gelu = TIMM_GELUS[act_layer]
    fields = {
        "gelu": gelu,
        "layer_norm_epsilon": config.get("layer_norm_epsilon", 1e-6),
    }
    transform, names = transform_of(config), class_names_of(config)

    has = f"as {PARAMETERS} has"
    classes = math.prod(shapes.get("head/bias", [0]))
    if config.get("num_classes", classes) != classes:
        found = config["num_classes"]
        raise config_error(path, "num_classes", found, f"{classes}, {has}")
    if names is not None and len(names) != classes:
        found = f"a list of {len(names)} names"
        raise config_error(path, "label_names", found, f"{classes}, {has}")
    patch = shapes["stem/kernel"][2:]
    tokens = [0, *shapes["MixerBlock_0/token_mixing/Dense_0/kernel"]][-1]
    if math.prod(transform.crop) != tokens * math.prod(patch):
        found = f"for {size_text(transform.crop)} pixels"
        expected = f"{tokens} patches of {'x'.join(map(str, patch))}, {has}"
        raise config_error(path, "input_size", found, expected)
    return FolderConfig(fields, transform, names)


def count_parameters(folder: str | os.PathLike[str]) -> int:
    """Returns the number of parameters in a folder, of which no arrays are read."""
    path = pathlib.Path(folder) / PARAMETERS
    header = read_pytorch_header(path)
    return sum(map(math.prod, _shapes(path, header).values()))


def _shapes(path: pathlib.Path, header: Header) -> dict[str, list[int]]:
    """Returns shapes by published key, with axes in the order of the package."""
    with safe_open(path, framework="numpy") as file:
        return {k: file.get_slice(x).get_shape() for k, x in header.names.items()}


def save_folder(
    folder: str | os.PathLike[str],
    params: Mapping[str, Any],
    fields: Mapping[str, Any],
    transform: EvalTransform,
    class_names: Sequence[str] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Writes a folder for timm, whole or not at all: two files, and a README.md.

    In PyTorch, `timm.create_model("local-dir:FOLDER", pretrained=True)` reads it, with
    the normalisation and the names of the classes. timm's Mixer has the exact erf GELU
    and a LayerNorm epsilon of 1e-6. Its config.json cannot say anything else, so if the
    model has, a warning and the README.md give the call that computes the same.

    Args:
      folder: made if it is not there; replaced if it is an earlier such folder.
      params: the published parameter tree, of float32 JAX or numpy arrays.
      fields: the model's `gelu` and `layer_norm_epsilon`; as in timm if it has none.
      transform: makes the images that the model expects.
      class_names: what the logits stand for, if that is known.
      facts: rows for the table in the README.md: what the model was trained on, and
        with which numbers.

    Raises:
      TypeError: `params` is no nested dict of arrays.
      CheckpointError: `params` are not those of a Mixer that timm can build, or not
        float32 or not finite; the images' pixels are permuted; there are more or fewer
        names than classes.
      FileError: `folder` is a URL, a file, or a folder with anything else in it.
    """
    sizes = layout.infer_model(params)
    num_classes, variant = sizes.num_classes or 0, sizes.variant
    fields = {**TIMM.fields, **fields}
    names = None if class_names is None else list(class_names)
    about = About(fields, transform.as_dict(), names)
    if class_names is not None and len(class_names) != num_classes:
        raise layout.CheckpointError(
            f"{folder}: not written. There are {len(class_names)} names for "
            f"{num_classes} classes."
        )
    if transform.permute:
        raise layout.CheckpointError(
            f"{folder}: not written. The model expects permuted pixels (pp.permute), "
            "which timm cannot make."
        )
    units = (variant.tokens_mlp_dim, variant.channels_mlp_dim)
    args = {
        "num_classes": num_classes,
        "img_size": list(transform.crop),
        "mlp_ratio": [_ratio(n, variant.hidden_dim) for n in units],
    }
    name = _architecture(folder, sizes, args)
    config, note = make_config(name, args, transform, class_names)
    config["layer_norm_epsilon"] = fields["layer_norm_epsilon"]
    config |= dict([_WRITTEN_BY])
    if arguments := timm_arguments(fields):
        logger.warning(
            "%s: for the same logits give timm.create_model these too: %s",
            folder,
            ", ".join(arguments),
        )
    if note:
        logger.warning("%s: %s", folder, note)
    with replace_folder_when_whole(folder, _is_own) as partial:
        try:
            path = partial / PARAMETERS
            save_state_dict(path, params, TIMM, to_metadata(about))
        except layout.CheckpointError as error:
            text = str(error).replace(str(path), str(folder))
            raise layout.CheckpointError(text) from error
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (partial / CONFIG).write_text(text, "utf-8")
        card = make_card(sizes, fields, transform, note, facts or {})
        (partial / CARD).write_text(card, "utf-8")


def _is_own(folder: pathlib.Path) -> bool:
    """Returns whether save_folder wrote a folder, and nothing was added since."""
    if {x.name for x in folder.iterdir()} - {CONFIG, PARAMETERS, CARD}:
        return False
    try:
        values = read_json(folder / CONFIG, layout.CheckpointError)
    except (OSError, layout.CheckpointError):
        return False
    return isinstance(values, dict) and values.get(_WRITTEN_BY[0]) == _WRITTEN_BY[1]


def _ratio(units: int, channels: int) -> float:
    """Returns the factor of which timm rounds the product with `channels` down."""
    ratio = units / channels
    return ratio if int(ratio * channels) == units else math.nextafter(ratio, math.inf)


def _architecture(
    folder: Any, sizes: layout.MixerSizes, args: Mapping[str, Any]
) -> str:
    """Returns what timm calls the Mixer that has other sizes in its arguments only."""
    wanted = sizes.variant
    for name, variant in ARCHITECTURES.items():
        fixed = (variant.patches, variant.num_blocks, variant.hidden_dim)
        if fixed == (wanted.patches, wanted.num_blocks, wanted.hidden_dim):
            return name
    more = {
        "patch_size": tuple(wanted.patches.size),
        "num_blocks": wanted.num_blocks,
        "embed_dim": wanted.hidden_dim,
    }
    call = ", ".join(f"{key}={value}" for key, value in {**args, **more}.items())
    raise layout.CheckpointError(
        f"{folder}: not written. It would hold a {sizes}. By a name timm builds only "
        f"Mixers with the patches, blocks and channels of {', '.join(ARCHITECTURES)}. "
        "Write a file that ends in .safetensors, and load it in PyTorch into "
        f"timm.models.mlp_mixer.MlpMixer({call})."
    )
