"""What arrays cannot say of a model: its GELU, how its images are made, its classes.

A safetensors file has it in its header, as metadata. An npz file cannot, for other
programs take all that is in it for parameters: it has a JSON file beside it, which is
called the same and ".json".
"""

import json
import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mixer_jax.data.evaluations import EVALUATIONS
from mixer_jax.data.interpolate import INTERPOLATIONS
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.data.sizes import fits_crop
from mixer_jax.data.values import (
    are_names,
    is_color,
    is_epsilon,
    is_name,
    is_size,
    is_std,
)
from mixer_jax.files import replace_when_whole
from mixer_jax.json_files import parse_json, read_json
from mixer_jax.model import GELUS, MlpMixer
from mixer_jax.weights.layout import CheckpointError

# Fields of MlpMixer that change what is computed, and no shape; and a label.
ABOUT_FIELDS = ("model_name", "gelu", "layer_norm_epsilon")
_TEXTS = ("model_name", "gelu")  # in metadata, the other values are JSON


class About(NamedTuple):
    """What is known of parameters.

    Attributes:
      fields: of MlpMixer, some of ABOUT_FIELDS.
      transform: of EvalTransform, which makes the images that the model expects.
      class_names: what the logits stand for; None if that is not known.
    """

    fields: Mapping[str, Any] = {}
    transform: Mapping[str, Any] = {}
    class_names: list[str] | None = None


def about_model(
    model: MlpMixer, transform: EvalTransform, class_names: Sequence[str] | None
) -> About:
    """Returns what is to be known of a model's parameters."""
    fields = {name: getattr(model, name, None) for name in ABOUT_FIELDS}
    return About(
        {name: value for name, value in fields.items() if value is not None},
        {} if transform.permute else transform.as_dict(),
        None if class_names is None else list(class_names),
    )


def write_beside(path: str | os.PathLike[str], about: About) -> None:
    """Writes the JSON file that belongs to an npz file."""
    text = json.dumps(_as_dict(about), indent=2) + "\n"
    with replace_when_whole(beside(path)) as partial:
        partial.write_text(text, "utf-8")


def read_beside(path: str | os.PathLike[str]) -> About:
    """Reads the JSON file that belongs to an npz file, if there is one.

    Raises:
      CheckpointError: it is damaged. The message says what is wrong.
    """
    path = beside(path)
    if not path.exists():
        return About()
    return _checked(str(path), read_json(path, CheckpointError))


def beside(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the path of the JSON file that belongs to an npz file."""
    return pathlib.Path(f"{os.fspath(path)}.json")


def to_metadata(about: About) -> dict[str, str]:
    """Returns what is known as the metadata of a safetensors file."""
    values = _as_dict(about).items()
    return {key: x if key in _TEXTS else json.dumps(x) for key, x in values}


def from_metadata(path: str | os.PathLike[str], metadata: Mapping[str, str]) -> About:
    """Returns what the metadata of a safetensors file say.

    Raises:
      CheckpointError: they are damaged.
    """
    keys = [
        key for key in (*ABOUT_FIELDS, "transform", "class_names") if key in metadata
    ]
    try:
        values = {
            key: metadata[key] if key in _TEXTS else parse_json(metadata[key])
            for key in keys
        }
    except ValueError as error:
        raise CheckpointError(f"{path}: its metadata are no JSON: {error}") from error
    return _checked(f"{path}: its metadata", values)


def _as_dict(about: About) -> dict[str, Any]:
    more = {"transform": about.transform, "class_names": about.class_names}
    return {**about.fields, **{key: x for key, x in more.items() if x}}


def _checked(where: str, values: Any) -> About:
    if not isinstance(values, dict):
        values = {"the whole": values}
    for key, (is_right, expected) in _RULES.items():
        if key in values and not is_right(values[key]):
            raise CheckpointError(
                f"{where}: {key} is {values[key]!r:.200}, expected {expected}. Write "
                "the file again: mixer-jax convert"
            )
    fields = {key: values[key] for key in ABOUT_FIELDS if key in values}
    return About(fields, values.get("transform", {}), values.get("class_names"))


def _is_transform(x: Any) -> bool:
    rules = {
        "crop": lambda x: is_size(x, 1),
        "resize": lambda x: is_size(x, 1),
        "evaluation": lambda x: x in list(EVALUATIONS),
        "interpolation": lambda x: x in [None, *INTERPOLATIONS],
        "mean": lambda x: is_color(x, 0),
        "std": is_std,
    }
    if not isinstance(x, dict) or not all(k in rules and rules[k](x[k]) for k in x):
        return False
    is_cut = "resize" in x and x.get("evaluation", "resize") != "resize"
    return not is_cut or ("crop" in x and fits_crop(x["resize"], x["crop"]))


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "the whole": (lambda x: False, "an object"),
    "model_name": (is_name, "a text"),
    "gelu": (lambda x: x in list(GELUS), " or ".join(GELUS)),
    "layer_norm_epsilon": (is_epsilon, "a number, at least 0"),
    "class_names": (lambda x: x is None or are_names(x), "a list of names"),
    "transform": (
        _is_transform,
        "what EvalTransform.as_dict returns",
    ),
}
