"""A model ready for use, from whatever holds one: a run, a file, a published name."""

import dataclasses
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from mixer_jax.data.dataset import Dataset, DatasetError, open_dataset
from mixer_jax.data.fingerprint import Fingerprint, changes, fingerprint
from mixer_jax.data.imagenet import imagenet_names
from mixer_jax.data.names import printable
from mixer_jax.data.permute import create_permute
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.data.sizes import Size, as_size, in_proportion, size_text
from mixer_jax.data.splits import choose_splits
from mixer_jax.model import MlpMixer
from mixer_jax.run.config import ConfigError
from mixer_jax.run.model import build_model
from mixer_jax.run.paths import resolved
from mixer_jax.run.resolution import adapt_model
from mixer_jax.training.losses import LOSSES
from mixer_jax.training.step import LossFn
from mixer_jax.variants import count_patches
from mixer_jax.weights.class_names import read_class_names
from mixer_jax.weights.layout import (
    CheckpointError,
    MixerSizes,
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

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class LoadedModel:
    """A model, and what must be known to use it.

    Attributes:
      model: the Mixer.
      params: its parameters, a nested dict of float32 numpy arrays.
      transform: makes the images that the model expects out of any image.
      class_names: what the logits stand for; None if that is not known.
      config: the config.json of the run; None if the model is from a bare file.
      multilabel: whether it was trained to find all of several labels of an image.
      fingerprint: of the run's data, if it is known.
    """

    model: MlpMixer
    params: dict[str, Any]
    transform: EvalTransform
    class_names: list[str] | None = None
    config: Mapping[str, Any] | None = None
    multilabel: bool = False
    fingerprint: Fingerprint | None = None

    @property
    def loss_fn(self) -> LossFn:
        """The run's loss; softmax cross-entropy for a bare file."""
        return LOSSES[(self.config or {}).get("loss", "softmax")]


def load_model(
    name_or_path: str | os.PathLike[str],
    *,
    gelu: str | None = None,
    class_names: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    resolution: str = "interpolate",
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
      image_size: (height, width) of the images in pixels, or one number for both, if
        not what the model is for.
      resolution: how the parameters are adapted to `image_size`; see
        `mixer_jax.weights.resolution`.

    Returns:
      The model. For a run it is the one that its config.json describes, with the run's
      transform. For a file its sizes are inferred; the transform of a published file is
      the short side to 256 pixels and a central crop (the paper's second), that of any
      other file a plain resize.

    Raises:
      OSError: there is no such file, or it cannot be fetched.
      CheckpointError: the parameters are damaged or of another model; a file is not
        for square images, and `image_size` is not the size that it is for; there are
        more or fewer names than classes; or the parameters cannot be adapted to
        `image_size`.
    """
    text = os.fspath(name_or_path)
    path = pathlib.Path(text).expanduser()
    if path.is_dir():
        loaded = _load_workdir(path)
    elif path.suffix == ".safetensors":
        loaded = _from_params(load_timm(path), text, image_size, gelu=timm_gelu(path))
    else:
        where = without_secrets(text)
        loaded = _from_params(load_checkpoint(text), where, image_size)
        if name := published_name(text):
            transform = EvalTransform(
                loaded.transform.crop, "resize_small_then_central_crop"
            )
            names = imagenet_names() if loaded.model.num_classes == 1000 else None
            model = loaded.model.clone(model_name=name)
            loaded = dataclasses.replace(
                loaded, model=model, transform=transform, class_names=names
            )
    if image_size is not None and as_size(image_size) != loaded.transform.crop:
        size, where = as_size(image_size), without_secrets(text)
        loaded = _at_image_size(loaded, size, resolution, where)
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


def open_test_split(
    loaded: LoadedModel,
    name: str | None,
    split: str | None = None,
    data_dir: str | None = None,
) -> tuple[Dataset, str]:
    """Opens the images to score a model on.

    Args:
      loaded: the model.
      name: of the dataset; None for that of the model's run.
      split: of the dataset; None for the one that the run was tested on, if the dataset
        is the run's, else for the usual one.
      data_dir: see `mixer_jax.data.dataset.open_dataset`; None for the run's.

    Returns:
      The dataset and the expression of the split. A warning says if these images are no
      longer those that the run was tested on.

    Raises:
      DatasetError: there is no such dataset.
    """
    config, label_key = loaded.config, None
    is_own = config is not None and (
        name is None
        or resolved({"dataset": name}) == resolved({"dataset": config["dataset"]})
    )
    if config is not None and is_own:
        name, split = config["dataset"], split or config["pp"].get("test")
        data_dir = data_dir or config.get("tfds_data_dir")
        label_key = config.get("label_key")
    assert name is not None, "a bare file has no dataset"
    try:
        opened = open_dataset(name, data_dir=data_dir, label_key=label_key)
    except DatasetError as error:
        if not is_own:
            raise
        raise DatasetError(
            "The dataset of the run cannot be opened. If it moved, give --dataset"
            f"{f' and --split {split!r}' if split else ''}. {error}"
        ) from error
    split = choose_splits(name, opened, test=split)[1]
    known = loaded.fingerprint
    if is_own and known and split in known["splits"]:
        before = known | {"splits": {split: known["splits"][split]}}
        for line in changes(before, fingerprint(opened, [split])):
            logger.warning("%s has changed since the run: %s", printable(name), line)
    return opened, split


def _at_image_size(
    loaded: LoadedModel, size: Size, resolution: str, where: str
) -> LoadedModel:
    old = loaded.transform
    if old.permute:
        raise CheckpointError(
            f"{where}: the run permuted the pixels of its images (pp.permute), and for "
            "another size of images the permutation would be another."
        )
    sizes = (old.crop, size)
    model, params = adapt_model(loaded.model, loaded.params, sizes, resolution, where)
    resize = in_proportion(old.resize, old.crop, size)
    transform = dataclasses.replace(old, crop=size, resize=resize)
    return dataclasses.replace(loaded, model=model, params=params, transform=transform)


def _from_params(
    params: dict[str, Any],
    where: str,
    image_size: int | Size | None = None,
    **fields: Any,
) -> LoadedModel:
    sizes = infer_sizes(shapes_of(params), where)
    size = sizes.image_size or _check_tokens(sizes, image_size, where)
    return LoadedModel(sizes.create_model(**fields), params, EvalTransform(size))


def _check_tokens(sizes: MixerSizes, image_size: int | Size | None, where: str) -> Size:
    """Returns `image_size` if images of that size have as many tokens as the file."""
    patch, message = sizes.variant.patches.size, ""
    if image_size is not None:
        size = as_size(image_size)
        try:
            tokens = math.prod(count_patches(size, patch))
        except ValueError as error:
            raise CheckpointError(f"{where}: {error}") from error
        if tokens == sizes.num_tokens:
            return size
        message = f" Images of {size_text(size)} pixels have {tokens}."
    raise CheckpointError(
        f"{where} is for {sizes.num_tokens} tokens of {size_text(patch)} pixels, which "
        f"make no square image.{message} Give the size of the images that it is for, "
        "as in --image-size 320x224 (height x width)."
    )


class Run(NamedTuple):
    """What the files in a workdir say of a run.

    Attributes:
      config: its config.json.
      class_names: of its dataset.
      multilabel: whether the images of its dataset have several labels.
      fingerprint: of its data; None for a run of before these were kept.
    """

    config: dict[str, Any]
    class_names: list[str]
    multilabel: bool
    fingerprint: Fingerprint | None


def read_run(workdir: pathlib.Path) -> Run:
    """Reads what a run recorded of itself.

    Raises:
      CheckpointError: the folder is not there, or not the workdir of a run.
    """
    if not workdir.is_dir():
        found = "is a file" if workdir.exists() else "is not there"
        raise CheckpointError(
            f"{printable(workdir)} {found}. Expected the workdir of a run, a folder."
        )
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
    dataset = workdir / "dataset.json"
    about = _read_json(dataset) if dataset.exists() else {}
    return Run(
        _read_json(workdir / "config.json"),
        _read_json(workdir / "class_names.json"),
        about.get("multilabel", False),
        about.get("fingerprint"),
    )


def read_run_params(workdir: pathlib.Path) -> tuple[dict[str, Any], str]:
    """Returns a run's parameters, and the file or checkpoint that they are from.

    That is final.npz, or the newest checkpoint if the run is not finished.

    Raises:
      FileNotFoundError: there is neither.
      CheckpointError: final.npz is damaged.
    """
    if (final := workdir / "final.npz").exists():
        return read_checkpoint(final), str(final)
    # Orbax takes a third of a second to import, and is seldom needed.
    from mixer_jax.training.checkpointing import read_latest_params, saved_steps

    params = read_latest_params(workdir)
    return params, f"{workdir}, step {saved_steps(workdir)[-1]}"


def _load_workdir(workdir: pathlib.Path) -> LoadedModel:
    config, class_names, multilabel, fingerprint = read_run(workdir)
    params, _ = read_run_params(workdir)
    try:
        model = build_model(config["model"], len(class_names))
    except ConfigError as error:
        raise CheckpointError(f"{workdir / 'config.json'}: {error}") from error
    if model.dtype is None:  # as in training: what the devices are fast at
        is_tpu = jax.default_backend() == "tpu"
        model = model.clone(dtype="bfloat16" if is_tpu else "float32")
    model = model.clone(remat="none", scan_blocks=False)  # these are for training
    pp = config["pp"]
    color = {x: pp[x] for x in ("mean", "std") if pp.get(x) is not None}
    transform = EvalTransform(
        pp["crop"],
        pp["evaluation"],
        pp["resize"],
        pp["transfer"],
        create_permute(pp.get("permute"), model.patches.size),
        pp.get("interpolation"),
        **color,
    )
    image_shape = (*transform.crop, 3)
    check_params(params, model, image_shape, f"{workdir} does not fit its config.json")
    return LoadedModel(
        model, params, transform, class_names, config, multilabel, fingerprint
    )


def _read_names(class_names: str) -> list[str]:
    if class_names == "imagenet1k":
        return imagenet_names()
    return read_class_names(pathlib.Path(class_names).expanduser())


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path} is no JSON file: {error}") from error
