"""A model ready for use, from whatever holds one: a run, a file, a published name."""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

from mixer_jax.data.imagenet import imagenet_names
from mixer_jax.data.permute import create_permute
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.model import MlpMixer
from mixer_jax.run.config import ConfigError
from mixer_jax.run.model import build_model
from mixer_jax.training.losses import LOSSES
from mixer_jax.training.step import LossFn
from mixer_jax.weights.class_names import read_class_names
from mixer_jax.weights.layout import (
    CheckpointError,
    check_params,
    infer_sizes,
    shapes_of,
)
from mixer_jax.weights.npz import read_checkpoint
from mixer_jax.weights.published import (
    load_checkpoint,
    published_name,
    without_secrets,
)
from mixer_jax.weights.timm import load_timm, timm_gelu


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model, and what must be known to use it.

    Attributes:
      model: the Mixer.
      params: its parameters, a nested dict of float32 numpy arrays.
      transform: makes the images that the model expects out of any image.
      class_names: what the logits stand for; None if that is not known.
      config: the config.json of the run; None if the model is from a bare file.
    """

    model: MlpMixer
    params: dict[str, Any]
    transform: EvalTransform
    class_names: list[str] | None = None
    config: Mapping[str, Any] | None = None

    @property
    def loss_fn(self) -> LossFn:
        """The run's loss; softmax cross-entropy for a bare file."""
        return LOSSES[(self.config or {}).get("loss", "softmax")]


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    gelu: str | None = None,
    class_names: str | None = None,
) -> LoadedModel:
    """Loads a model with all that is known of its use.

    Args:
      name_or_path: the workdir of a run, of which final.npz is read, or before that
        exists the newest checkpoint; a timm file ending in .safetensors; else what
        `mixer_jax.load_checkpoint` takes, a published name or an npz file.
      gelu: "tanh" or "erf", to be used instead of what the run or the timm file says.
        An npz file says nothing, and counts as "tanh".
      class_names: "imagenet1k", or a file with one name a line or a JSON list of them,
        to be used instead of the source's. A run has those of its dataset, a published
        file of 1000 classes those of ImageNet-1k, and other files none.

    Returns:
      The model. For a run it is the one that its config.json describes, with the run's
      transform. For a file its sizes are inferred; the transform of a published file is
      the short side to 256 pixels and a central crop (the paper's second), that of any
      other file a plain resize.

    Raises:
      OSError: there is no such file, or it cannot be fetched.
      CheckpointError: the parameters are damaged or of another model; the file is not
        for square images; or there are more or fewer names than classes.
    """
    text = os.fspath(name_or_path)
    path = pathlib.Path(text).expanduser()
    if path.is_dir():
        loaded = _load_workdir(path)
    elif path.suffix == ".safetensors":
        loaded = _from_params(load_timm(path), text, gelu=timm_gelu(path))
    else:
        loaded = _from_params(load_checkpoint(text), without_secrets(text))
        if name := published_name(text):
            size = loaded.transform.crop
            transform = EvalTransform(size, "resize_small_then_central_crop", 256)
            names = imagenet_names() if loaded.model.num_classes == 1000 else None
            model = loaded.model.clone(model_name=name)
            loaded = dataclasses.replace(
                loaded, model=model, transform=transform, class_names=names
            )
    if gelu:
        loaded = dataclasses.replace(loaded, model=loaded.model.clone(gelu=gelu))
    if class_names:
        loaded = dataclasses.replace(loaded, class_names=_read_names(class_names))
    names, num_classes = loaded.class_names, loaded.model.num_classes
    if names is not None and len(names) != num_classes:
        raise CheckpointError(
            f"{without_secrets(text)} has {num_classes or 'no'} classes, but "
            f"{class_names or 'class_names.json'} names {len(names)}."
        )
    return loaded


def _from_params(params: dict[str, Any], where: str, **fields: Any) -> LoadedModel:
    sizes = infer_sizes(shapes_of(params), where)
    height, width = sizes.image_size or (0, 1)
    if height != width:
        raise CheckpointError(
            f"{where} is for {sizes.num_tokens} tokens of {sizes.variant.patches.size} "
            "pixels, which make no square image; the transforms make square ones only. "
            "Use mixer_jax.load_checkpoint, and make the images yourself."
        )
    return LoadedModel(sizes.create_model(**fields), params, EvalTransform(height))


def _load_workdir(workdir: pathlib.Path) -> LoadedModel:
    for name in ("config.json", "class_names.json"):
        if not (workdir / name).exists():
            files = [
                x.name
                for x in workdir.iterdir()
                if x.suffix in (".npz", ".json", ".safetensors")
                or (x / "config.json").exists()
            ]
            raise CheckpointError(
                f"{workdir} is a folder without a {name}, and so not the workdir of a "
                "run. Name a workdir or a file. In it: "
                f"{', '.join(sorted(files)) or '-'}"
            )
    config = _read_json(workdir / "config.json")
    class_names = _read_json(workdir / "class_names.json")
    if (final := workdir / "final.npz").exists():
        params = read_checkpoint(final)
    else:
        # Orbax takes a third of a second to import, and is seldom needed.
        from mixer_jax.training.checkpointing import read_latest_params

        params = read_latest_params(workdir)
    try:
        model = build_model(config["model"], len(class_names))
    except ConfigError as error:
        raise CheckpointError(f"{workdir / 'config.json'}: {error}") from error
    if model.dtype is None:  # as in training: what the devices are fast at
        is_tpu = jax.default_backend() == "tpu"
        model = model.clone(dtype="bfloat16" if is_tpu else "float32")
    model = model.clone(remat="none", scan_blocks=False)  # these are for training
    pp = config["pp"]
    image_shape = (pp["crop"], pp["crop"], 3)
    check_params(params, model, image_shape, f"{workdir} does not fit its config.json")
    transform = EvalTransform(
        pp["crop"],
        pp["evaluation"],
        pp["resize"],
        pp["transfer"],
        create_permute(pp.get("permute"), model.patches.size),
    )
    return LoadedModel(model, params, transform, class_names, config)


def _read_names(class_names: str) -> list[str]:
    if class_names == "imagenet1k":
        return imagenet_names()
    return read_class_names(pathlib.Path(class_names).expanduser())


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is no JSON file: {error}") from error
