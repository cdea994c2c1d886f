"""What holds parameters: told apart here, and read in one way.

A published name; an npz file in the published or the older layout; a safetensors file
of timm or mlp-mixer-pytorch; a folder of the Hugging Face hub, or its name there.
`mixer_jax.run.source` adds the workdir of a run.
"""

import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from mixer_jax.data.imagenet import imagenet_names
from mixer_jax.data.preprocess import HALF, EvalTransform
from mixer_jax.data.sizes import Size, as_size, in_proportion
from mixer_jax.variants import VARIANTS, count_patches
from mixer_jax.weights import hub, huggingface, layout, npz
from mixer_jax.weights.about import About, from_metadata, read_beside
from mixer_jax.weights.published import (
    BUCKET,
    PUBLISHED,
    PUBLISHED_FIELDS,
    SUFFIXES,
    is_published_folder,
    published_name,
    read_published,
    resolve,
    without_secrets,
)
from mixer_jax.weights.pytorch import read_pytorch_header
from mixer_jax.weights.state_dict import read_params


class Weights(NamedTuple):
    """Parameters, and what is known of them.

    Attributes:
      params: a nested dict of float32 numpy arrays, with published keys.
      fields: of MlpMixer, what is known beyond sizes: some of `about.ABOUT_FIELDS`.
      transform: makes the images that the model expects; None if their size is not
        known, since they are not square or the model is no published one.
      class_names: what the logits stand for; None if that is not known.
      where: the file, for messages.
    """

    params: dict[str, Any]
    fields: dict[str, Any]
    transform: EvalTransform | None
    class_names: list[str] | None
    where: str


@dataclasses.dataclass(frozen=True)
class WeightsSource:
    """Something that holds parameters, and what is known before they are read.

    Attributes:
      about: what it says of them.
      read: reads the parameters; returns them, and the file for messages.
    """

    about: About
    read: Callable[[], tuple[dict[str, Any], str]]

    def load(self, image_size: Size | None = None) -> Weights:
        """Reads the parameters.

        Args:
          image_size: (height, width) of the images in pixels. It is read only if the
            source does not say it, and the images cannot be square.
        """
        params, where = self.read()
        fields, transform, class_names = self.about
        made = _transform(params, transform, image_size)
        return Weights(params, dict(fields), made, class_names, where)


def read_weights(
    name_or_path: str | os.PathLike[str], *, image_size: Size | None = None
) -> Weights:
    """Reads parameters and what is known of them, from whatever holds them.

    Args:
      name_or_path: what `open_weights` takes.
      image_size: see `WeightsSource.load`.

    Raises:
      OSError: there is no such file, or it cannot be fetched.
      CheckpointError: it is not sound, or of another program.
    """
    return open_weights(name_or_path).load(image_size)


def open_weights(name_or_path: str | os.PathLike[str]) -> WeightsSource:
    """Tells what a name or a path stands for, and what is known of it.

    Args:
      name_or_path: one of PUBLISHED, such as "imagenet21k/Mixer-B_16", or its URL; a
        repository of the Hugging Face hub, such as "timm/mixer_b16_224.goog_in21k"; the
        URL of a file; or the path of a file, or of a folder with config.json and
        model.safetensors. A model.safetensors beside timm's config.json stands for the
        folder. A file that ends in .safetensors is of timm or of mlp-mixer-pytorch; any
        other is an npz file.

    Returns:
      The source. Of the published files nothing is fetched or read before the
      parameters are; of others the head is read.

    Raises:
      OSError: there is no such file, or it cannot be fetched.
      CheckpointError: it is not sound, or of another program.
    """
    text = os.fspath(name_or_path)
    if name := published_name(text):
        return WeightsSource(_about_published(name), lambda: read_published(name))
    path = hub.resolve_hub(text) if hub.is_hub_name(text) else resolve(text)
    where = without_secrets(text) if "://" in text else str(path)
    about, folder = None, huggingface.folder_of(path)
    if path.is_dir() and folder is None:
        raise IsADirectoryError(
            f"{path} is a folder without config.json and model.safetensors."
        )
    if folder:
        if (config := huggingface.read_folder_config(folder)).transform:
            about = About(config.fields, config.transform.as_dict(), config.class_names)
        path = folder / huggingface.PARAMETERS
    if path.suffix != ".safetensors":
        return WeightsSource(
            read_beside(path), lambda: (npz.read_checkpoint(path), where)
        )
    header = read_pytorch_header(path)
    said = about or from_metadata(path, header.metadata)
    about = said._replace(fields={**header.package.fields, **said.fields})
    return WeightsSource(about, lambda: (read_params(path, header), where))


def find_checkpoint(pretrained_dir: str | os.PathLike[str], model_name: str) -> str:
    """Returns the name or path that `pretrained_dir` and `model_name` stand for.

    Nothing is fetched, and it may not be there. It is the first of these:

    1. A published file, as in "imagenet21k/Mixer-B_16".
    2. The file `model_name` of a published folder, "imagenet21k" or
       "gs://mixer_models/imagenet21k". A published folder's bare name always means
       that: for a local folder called sam write "./sam".
    3. The file at a URL that ends in .npz or .safetensors. Any other URL is that of a
       folder, with the file {model_name}.npz.
    4. A local file.
    5. In a local folder, the file {model_name}.npz, then {model_name}.safetensors.
    6. A local folder with a config.json: the workdir of a run, or what the Hugging
       Face hub has.
    7. A repository of the Hugging Face hub.

    Args:
      pretrained_dir: as above.
      model_name: "Mixer-B_16", or "B/16"; in a local folder the name of any file,
        without its ending.
    """
    text = os.fspath(pretrained_dir)
    folder = text.rstrip("/")
    if model_name in VARIANTS:
        model_name = f"Mixer-{model_name.replace('/', '_')}"
    if is_published_folder(folder):
        folder = BUCKET + folder
    if folder in PUBLISHED:
        return folder
    if "://" in folder:
        is_file = folder.partition("?")[0].endswith(SUFFIXES)
        return folder if is_file else f"{folder}/{model_name}.npz"
    path = pathlib.Path(text).expanduser()
    files = [path / f"{model_name}{suffix}" for suffix in SUFFIXES]
    found = [x for x in files if x.is_file()]
    is_file = path.is_file() or (path.suffix in SUFFIXES and not path.exists())
    if is_file or (path / "config.json").exists():
        found.append(path)
    if not found and hub.is_hub_name(text):
        return text
    return str((found or files)[0])


def _about_published(name: str) -> About:
    num_classes = PUBLISHED[name].sizes.num_classes
    return About(
        {"model_name": name, **PUBLISHED_FIELDS},
        # The paper's second way to make images.
        {
            "evaluation": "resize_small_then_central_crop",
            "resize": 256,
            "mean": HALF,
            "std": HALF,
        },
        imagenet_names() if num_classes == 1000 else None,
    )


def _transform(
    params: Mapping[str, Any], known: Mapping[str, Any], image_size: Size | None
) -> EvalTransform | None:
    crop = known.get("crop") or _image_size(params, image_size)
    if crop is None:
        return None
    resize = in_proportion((256, 256), (224, 224), as_size(crop))
    return EvalTransform(**{"crop": crop, "resize": resize, **known})


def _image_size(params: Mapping[str, Any], image_size: Size | None) -> Size | None:
    """Returns (height, width) of the images that parameters are for, if that is clear.

    Square images are; others are if they are of `image_size`.
    """
    try:
        sizes = layout.infer_sizes(layout.shapes_of(params), "The parameters")
    except layout.CheckpointError:  # of a changed model: its shapes say nothing
        return None
    if sizes.image_size or image_size is None:
        return sizes.image_size
    patch = sizes.variant.patches.size
    is_whole = not any(a % b for a, b in zip(image_size, patch, strict=True))
    if is_whole and math.prod(count_patches(image_size, patch)) == sizes.num_tokens:
        return image_size
    return None
