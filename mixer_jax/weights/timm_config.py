"""The config.json of a timm Mixer: how images are made for it, and its classes.

Such files come from anyone. So each value that is used is checked, and an error names
its key.
"""

import json
import math
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mixer_jax.data.imagenet import imagenet_names, imagenet_synsets
from mixer_jax.data.names import printable
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.data.values import are_names, is_epsilon, is_number, is_whole
from mixer_jax.json_files import read_json
from mixer_jax.variants import VARIANTS
from mixer_jax.weights.layout import CheckpointError

Check = tuple[Callable[[Any], bool], str]  # of a value, and what is expected of it

# The Mixers that timm builds, and what it calls them.
ARCHITECTURES = {
    f"mixer_{name.lower().replace('/', '')}_224": VARIANTS[name]
    for name in ("S/32", "S/16", "B/32", "B/16", "L/32", "L/16")
}
# What timm calls its ways to cut an image (crop_mode), to resize it, and its GELUs; and
# the names here.
EVALUATIONS = {"center": "torchvision", "squash": "squash"}
INTERPOLATIONS = {"bilinear": "pil_bilinear", "bicubic": "pil_bicubic"}
TIMM_GELUS = {"gelu": "erf", "gelu_tanh": "tanh"}

# What timm takes where config.json does not say: the fields of its PretrainedCfg.
_DEFAULTS: dict[str, Any] = {
    "input_size": [3, 224, 224],
    "interpolation": "bicubic",
    "crop_pct": 0.875,
    "crop_mode": "center",
    "mean": [0.485, 0.456, 0.406],
    "std": [0.229, 0.224, 0.225],
}


def read_config(path: pathlib.Path) -> dict[str, Any]:
    """Returns the keys of timm's config.json, flat, checked and with timm's defaults.

    Those of `pretrained_cfg` stand beside the others. Those of `model_args` are called
    "model_args.KEY".

    Returns:
      No keys at all if the file is not timm's: if it has no "architecture".

    Raises:
      FileNotFoundError: there is no such file.
      CheckpointError: it is damaged, of another model, or has a value that is not
        supported. The message says which key, what was found and what was expected.
    """
    values = read_json(path, CheckpointError)
    if not isinstance(values, dict):
        raise config_error(path, "the whole", values, "a table of keys")
    if "architecture" not in values:
        # transformers has no Mixer, and writes one of these keys.
        for key in {"model_type", "architectures"} & values.keys():
            raise config_error(path, key, values[key], "the config.json of a Mixer")
        return {}
    tables = {}
    for key in ("pretrained_cfg", "model_args"):
        tables[key] = values.pop(key, None) or {}
        if not isinstance(tables[key], dict):
            raise config_error(path, key, tables[key], "a table of keys")
    args = {f"model_args.{key}": value for key, value in tables["model_args"].items()}
    # As in timm, what stands beside "architecture" wins.
    merged = _without_null(tables["pretrained_cfg"]) | _without_null(values | args)
    for key in _RULES.keys() & merged.keys():
        is_right, expected = _RULES[key]
        if not is_right(merged[key]):
            raise config_error(path, key, merged[key], expected)
    for key in merged:
        if key.startswith("model_args.") and key not in _RULES | _FREE_ARGS:
            raise config_error(path, key, merged[key], "no such key, which is unknown")
    return _DEFAULTS | merged


def is_of_timm(path: pathlib.Path) -> bool:
    """Returns whether a file is a config.json of timm: has an "architecture"."""
    try:
        values = read_json(path, CheckpointError)
    except CheckpointError:
        return False
    return isinstance(values, dict) and "architecture" in values


def config_error(
    path: pathlib.Path, key: str, found: Any, expected: str
) -> CheckpointError:
    """Returns the error that a key of a config.json is not as expected."""
    shown = found if isinstance(found, str) else json.dumps(found)
    if len(shown) > 80:
        shown = f"{shown[:80]}…"
    return CheckpointError(
        f"{printable(path)}: {key} is {printable(shown)}, expected {expected}."
    )


def _without_null(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if value is not None}


def _is_count(x: Any, least: int = 1) -> bool:
    return is_whole(x, least) and x < 2**31


def _is_list(x: Any, lengths: Sequence[int], is_item: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and len(x) in lengths and all(map(is_item, x))


def _is_names(x: Any) -> bool:
    if isinstance(x, dict):  # by the number of the class
        return all(re.fullmatch("[0-9]{1,9}", key) for key in x) and are_names(
            list(x.values())
        )
    return are_names(x)


def _one_of(names: Mapping[str, Any]) -> Check:
    return lambda x: isinstance(x, str) and x in names, f"one of {', '.join(names)}"


def _only(value: Any) -> Check:
    return lambda x: x == value, f"{json.dumps(value)}; others are not supported"


_CLASSES: Check = (lambda x: _is_count(x, 0), "a number of classes")

# The keys that are used, and those that change what is computed.
_RULES: dict[str, Check] = {
    "architecture": _one_of(ARCHITECTURES),
    "num_classes": _CLASSES,
    "input_size": (
        lambda x: _is_list(x, [3], _is_count) and x[0] == 3,
        "[3, height, width]",
    ),
    "interpolation": _one_of(INTERPOLATIONS),
    "crop_pct": (
        lambda x: is_number(x) and 0.05 <= x <= 1,
        "a share of the image, from 0.05 to 1",
    ),
    "crop_mode": _one_of(EVALUATIONS),
    "mean": (
        lambda x: _is_list(x, [1, 3], lambda y: is_number(y) and 0 <= y <= 1),
        "three numbers from 0 to 1",
    ),
    "std": (
        lambda x: _is_list(x, [1, 3], lambda y: is_number(y, math.ulp(0))),
        "three numbers above 0",
    ),
    "label_offset": _only(0),
    "label_names": (_is_names, "a list of names"),
    "label_descriptions": (
        lambda x: isinstance(x, dict) and are_names(list(x.values())),
        "a text for each of label_names",
    ),
    "layer_norm_epsilon": (  # written by this package, for itself
        is_epsilon,
        "a number, at least 0",
    ),
    "model_args.num_classes": _CLASSES,
    "model_args.img_size": (
        lambda x: _is_count(x) or _is_list(x, [2], _is_count),
        "[height, width]",
    ),
    "model_args.in_chans": _only(3),
    "model_args.global_pool": _only("avg"),
    "model_args.stem_norm": _only(False),
    "model_args.act_layer": _one_of(TIMM_GELUS),
}
# Arguments of timm's MlpMixer that change only how it is trained; and mlp_ratio, which
# the shapes of the parameters say.
_FREE_ARGS = dict.fromkeys(
    f"model_args.{name}"
    for name in ("drop_rate", "proj_drop_rate", "drop_path_rate", "nlhb", "mlp_ratio")
)


def transform_of(config: Mapping[str, Any]) -> EvalTransform:
    """Returns the transform that timm scores with, for what read_config returns."""
    size = config.get("model_args.img_size", config["input_size"][1:])
    crop = (size, size) if isinstance(size, int) else tuple(size)
    mean, std = (3 * x if len(x) == 1 else x for x in (config["mean"], config["std"]))
    return EvalTransform(
        crop,
        EVALUATIONS[config["crop_mode"]],
        tuple(math.floor(side / config["crop_pct"]) for side in crop),
        interpolation=INTERPOLATIONS[config["interpolation"]],
        mean=mean,
        std=std,
    )


def class_names_of(config: Mapping[str, Any]) -> list[str] | None:
    """Returns names for people: the descriptions of labels, where there are any."""
    labels = config.get("label_names")
    if labels is None:
        # So the tags of timm end that name ImageNet-1k as what was trained on.
        is_imagenet = str(config.get("tag")).endswith("in1k")
        is_imagenet = is_imagenet and config.get("num_classes") == 1000
        return imagenet_names() if is_imagenet else None
    if isinstance(labels, dict):
        labels = [labels[key] for key in sorted(labels, key=int)]
    words = imagenet_synsets() | config.get("label_descriptions", {})
    return [words.get(label, label) for label in labels]


def make_config(
    architecture: str,
    model_args: Mapping[str, Any],
    transform: EvalTransform,
    class_names: Sequence[str] | None,
) -> tuple[dict[str, Any], str | None]:
    """Returns the config.json of a timm Mixer, and what timm does otherwise.

    Args:
      architecture: one of ARCHITECTURES.
      model_args: arguments of timm's MlpMixer, num_classes among them.
      transform: how images are made for the model.
      class_names: what the logits stand for, if that is known.

    Returns:
      The keys; and a sentence on how timm's images differ, None if they are the same.
    """
    keeps_shape = transform.evaluation in (
        "torchvision",
        "resize_small_then_central_crop",
    )
    mode = "center" if keeps_shape else "squash"
    interpolation = (
        "bicubic" if "bicubic" in transform.used_interpolation else "bilinear"
    )
    resize = transform.crop if transform.evaluation == "resize" else transform.resize
    # timm divides both sides by it, and rounds down.
    crop_pct = min(a / b for a, b in zip(transform.crop, resize, strict=True))
    while any(
        math.floor(a / crop_pct) < b
        for a, b in zip(transform.crop, resize, strict=True)
    ):
        crop_pct = math.nextafter(crop_pct, 0)
    config = {
        "architecture": architecture,
        "num_classes": model_args["num_classes"],
        "num_features": ARCHITECTURES[architecture].hidden_dim,
        "global_pool": "avg",
        "model_args": dict(model_args),
        "pretrained_cfg": {
            "custom_load": False,
            "input_size": [3, *transform.crop],
            "fixed_input_size": True,
            "interpolation": interpolation,
            "crop_pct": crop_pct,
            "crop_mode": mode,
            "mean": list(transform.mean),
            "std": list(transform.std),
            "num_classes": model_args["num_classes"],
            "pool_size": None,
            "first_conv": "stem.proj",
            "classifier": "head",
        },
    }
    if class_names is not None:
        config["label_names"] = [printable(name) for name in class_names]
    scored = transform_of({**_DEFAULTS, **config["pretrained_cfg"]})
    if scored.steps == transform.steps:
        return config, None
    return config, f"timm's images differ slightly. Here: {transform.steps}."
