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
from mixer_jax.run.config import LOSSES
from mixer_jax.training.step import LossFn
from mixer_jax.variants import Patches
from mixer_jax.weights.layout import CheckpointError, infer_model
from mixer_jax.weights.npz import read_checkpoint
from mixer_jax.weights.published import load_checkpoint, published_name
from mixer_jax.weights.timm import load_timm, timm_gelu


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model, and what must be known to use it.

    Attributes:
      model: the Mixer.
      params: its parameters, the published tree of float32 numpy arrays.
      transform: makes the images that it expects out of any others.
      class_names: what its logits stand for; None where nothing tells.
      config: the run's config.json; None where there was no run.
    """

    model: MlpMixer
    params: dict[str, Any]
    transform: EvalTransform
    class_names: list[str] | None = None
    config: Mapping[str, Any] | None = None

    @property
    def loss_fn(self) -> LossFn:
        """The run's loss, softmax cross-entropy where there was no run."""
        return LOSSES[(self.config or {}).get("loss", "softmax")]


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    gelu: str | None = None,
    class_names: str | None = None,
) -> LoadedModel:
    """Loads a model with all that is known of its use.

    Args:
      name_or_path: the workdir of a run, of which final.npz is taken, or before that is
        there the newest checkpoint; a timm file ending in .safetensors; else what
        `mixer_jax.load_checkpoint` takes, a published name or an npz file.
      gelu: "tanh" or "erf", where the source's own word on it is not to be taken. An
        npz file says nothing, and counts as "tanh".
      class_names: "imagenet1k", or a file with one name a line or a JSON list of them,
        instead of the source's own. A run has those of its dataset, a published file of
        1000 classes those of ImageNet-1k, and other files none.

    Returns:
      The model. Its transform is the run's; for a published file the short side to 256
      pixels and a central crop (the paper's second); else a plain resize.

    Raises:
      OSError: there is no such file, or it cannot be fetched.
      CheckpointError: what is there is not a sound Mixer for square images, or has
        another number of classes than there are names.
    """
    text = os.fspath(name_or_path)
    path = pathlib.Path(text).expanduser()
    if path.is_dir():
        loaded = _load_workdir(path)
    elif path.suffix == ".safetensors":
        loaded = _from_params(load_timm(path), text, gelu=timm_gelu(path))
    else:
        loaded = _from_params(load_checkpoint(text), text)
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
            f"{text} has {num_classes or 'no'} classes, but "
            f"{class_names or 'class_names.json'} names {len(names)}."
        )
    return loaded


def _from_params(params: dict[str, Any], where: str, **fields: Any) -> LoadedModel:
    sizes = infer_model(params)
    height, width = sizes.image_size or (0, 1)
    if height != width:
        raise CheckpointError(
            f"{where} is for {sizes.num_tokens} tokens of {sizes.patch_size} pixels, "
            "which make no square image; the transforms make square ones only. Use "
            "mixer_jax.load_checkpoint and images of your own."
        )
    return LoadedModel(sizes.create_model(**fields), params, EvalTransform(height))


def _load_workdir(workdir: pathlib.Path) -> LoadedModel:
    if not (workdir / "config.json").exists():
        files = [x.name for x in workdir.iterdir() if x.suffix in (".npz", ".json")]
        raise CheckpointError(
            f"{workdir} is a folder without a config.json, and so not the workdir of a "
            f"run. Name a workdir or a file. In it: {', '.join(sorted(files)) or '-'}"
        )
    config = _read_json(workdir / "config.json")
    final, names = workdir / "final.npz", workdir / "class_names.json"
    if final.exists():
        params = read_checkpoint(final)
    else:
        # Orbax takes a third of a second to import, and is seldom needed.
        from mixer_jax.training.checkpointing import read_latest_params

        params = read_latest_params(workdir)
    fields, pp = dict(config["model"]), config["pp"]
    patch_size = tuple(fields["patches"]["size"])
    if fields["dtype"] is None:  # as in training: what the devices are fast at
        fields["dtype"] = "bfloat16" if jax.default_backend() == "tpu" else "float32"
    fields |= {"remat": "none", "scan_blocks": False}  # these are for training
    fields |= {"patches": Patches(patch_size)}
    num_classes = infer_model(params).num_classes
    return LoadedModel(
        MlpMixer(num_classes=num_classes, **fields),
        params,
        EvalTransform(
            pp["crop"],
            pp["evaluation"],
            pp["resize"],
            pp["transfer"],
            create_permute(pp.get("permute"), patch_size),
        ),
        _read_json(names) if names.exists() else None,
        config,
    )


def _read_names(class_names: str) -> list[str]:
    if class_names == "imagenet1k":
        return imagenet_names()
    path = pathlib.Path(class_names).expanduser()
    if path.suffix == ".json":
        return _read_json(path)
    return path.read_text("utf-8").splitlines()


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is no JSON file: {error}") from error
