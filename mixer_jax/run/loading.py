"""A model ready for use, from whatever holds one: a run, a file, a published name."""

import dataclasses
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

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
from mixer_jax.run.records import read_run
from mixer_jax.run.resolution import adapt_model
from mixer_jax.run.source import find_workdir, read_run_params
from mixer_jax.training.losses import LOSSES
from mixer_jax.training.step import LossFn
from mixer_jax.variants import count_patches
from mixer_jax.weights.class_names import read_class_names
from mixer_jax.weights.layout import (
    CheckpointError,
    MixerSizes,
    check_params,
    flatten,
    infer_model,
)
from mixer_jax.weights.published import without_secrets
from mixer_jax.weights.reading import read_weights

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
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
    class_names: str | None = None,
    image_size: int | tuple[int, int] | None = None,
    resolution: str = "interpolate",
) -> LoadedModel:
    """Loads a model with all that is known of its use.

    Args:
      name_or_path: the workdir of a run, or its final.npz; before that exists, the
        newest checkpoint is read. Or what `mixer_jax.weights.reading.open_weights`
        takes: a published name, one of the Hugging Face hub, a file, a folder.
      gelu: "tanh" or "erf", to be used instead of what is known of the parameters.
      mean: of red, green and blue in units of [0, 1], or one number for all three, to
        be used instead of what is known.
      std: the standard deviation in the same way.
      class_names: "imagenet1k", or a file with one name a line or a JSON list of them,
        to be used instead of what is known. A run has those of its dataset, a published
        file of 1000 classes those of ImageNet-1k.
      image_size: (height, width) of the images in pixels, or one number for both, if
        not what the model is for.
      resolution: how the parameters are adapted to `image_size`; see
        `mixer_jax.weights.resolution`.

    Returns:
      The model. For a run it is the one that its config.json describes, with the run's
      transform. For a file its sizes are inferred, and the rest is as the file says or
      as is known of its name. The transform of a published file is the short side to
      256 pixels and a central crop (the paper's second); that of a file which says
      nothing is a plain resize.

    Raises:
      OSError: there is no such file, or it cannot be fetched.
      CheckpointError: the parameters are damaged or of another model; a file is not
        for square images, and `image_size` is not the size that it is for; there are
        more or fewer names than classes; or the parameters cannot be adapted to
        `image_size`.
    """
    text = os.fspath(name_or_path)
    if workdir := find_workdir(text):
        loaded = _load_workdir(workdir)
    else:
        loaded = _load_weights(text, image_size)
    if image_size is not None and as_size(image_size) != loaded.transform.crop:
        size, where = as_size(image_size), without_secrets(text)
        loaded = _at_image_size(loaded, size, resolution, where)
    if gelu:
        loaded = dataclasses.replace(loaded, model=loaded.model.clone(gelu=gelu))
    given: dict[str, Any] = {"mean": mean, "std": std}
    colors = {key: x for key, x in given.items() if x is not None}
    transform = dataclasses.replace(loaded.transform, **colors)
    loaded = dataclasses.replace(loaded, transform=transform)
    if class_names:
        loaded = dataclasses.replace(loaded, class_names=_read_names(class_names))
    names, num_classes = loaded.class_names, loaded.model.num_classes
    if names is not None and len(names) != num_classes:
        raise CheckpointError(
            f"{without_secrets(text)} has {num_classes or 'no'} classes, but "
            f"{class_names or 'its list of classes'} names {len(names)}."
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


def _load_weights(text: str, image_size: int | Size | None) -> LoadedModel:
    size = None if image_size is None else as_size(image_size)
    weights = read_weights(text, image_size=size)
    sizes = infer_model(weights.params, weights.where)
    if weights.transform is None:
        raise _unknown_size(sizes, size, weights.where)
    known = {x.name for x in dataclasses.fields(MlpMixer)}  # a fork may lack some
    fields = {key: x for key, x in weights.fields.items() if key in known}
    model = sizes.create_model(**fields)
    params, names = weights.params, weights.class_names
    shape = (*weights.transform.crop, sizes.image_channels)
    check_params(params, model, shape, weights.where)
    return LoadedModel(model, params, weights.transform, names)


def _unknown_size(
    sizes: MixerSizes, image_size: Size | None, where: str
) -> CheckpointError:
    """Returns the error that a file is for images of another shape than square."""
    patch, message = sizes.variant.patches.size, ""
    if image_size is not None:
        try:
            tokens = math.prod(count_patches(image_size, patch))
        except ValueError as error:
            return CheckpointError(f"{where}: {error}")
        message = f" Images of {size_text(image_size)} pixels have {tokens}."
    return CheckpointError(
        f"{where} is for {sizes.num_tokens} tokens of {size_text(patch)} pixels, which "
        f"make no square image.{message} Give the size of the images that it is for, "
        "as in --image-size 320x224 (height x width)."
    )


def _load_workdir(workdir: pathlib.Path) -> LoadedModel:
    config, class_names, multilabel, fingerprint = read_run(workdir)
    params, _ = read_run_params(workdir)
    try:
        model = build_model(config["model"], len(class_names))
    except ConfigError as error:
        raise CheckpointError(f"{workdir / 'config.json'}: {error}") from error
    if getattr(model, "num_blocks", 0) > (count := len(flatten(params))):
        raise CheckpointError(
            f"{workdir / 'config.json'}: model.num_blocks is {model.num_blocks}, more "
            f"than the {count} arrays of parameters that are there."
        )
    if config["model"].get("dtype", "") is None:  # what the devices are fast at
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
