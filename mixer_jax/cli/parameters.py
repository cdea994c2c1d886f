"""What one does with files of parameters: convert, checkpoints, inspect."""

import dataclasses
import math
import pathlib
import shlex
from typing import Literal

from tyro.conf import Positional

from mixer_jax.cli.app import UsageError, app, print_table
from mixer_jax.cli.models import (
    ChannelValues,
    ImageSize,
    Model,
    Resolution,
    check_std,
)
from mixer_jax.data.sizes import as_value
from mixer_jax.run.card import card_facts
from mixer_jax.run.loading import load_model
from mixer_jax.run.source import find_workdir
from mixer_jax.variants import count_patches
from mixer_jax.weights.about import about_model, beside, write_beside
from mixer_jax.weights.huggingface import save_folder
from mixer_jax.weights.layout import infer_model, shapes_of, sizes_of
from mixer_jax.weights.names import block_of, in_block, is_head
from mixer_jax.weights.npz import save_checkpoint
from mixer_jax.weights.published import (
    PUBLISHED,
    PUBLISHED_FIELDS,
    cache_dir,
    is_cached,
    published_name,
)
from mixer_jax.weights.pytorch import save_pytorch
from mixer_jax.weights.reading import open_weights, read_weights


@app.command
def convert(
    model: Model,
    target: Positional[pathlib.Path],
    to: Literal["npz", "timm", "mlp-mixer-pytorch", "hf"] | None = None,
    gelu: Literal["tanh", "erf"] | None = None,
    mean: ChannelValues = None,
    std: ChannelValues = None,
    class_names: str | None = None,
    image_size: ImageSize = None,
    resolution: Resolution = "interpolate",
) -> None:
    """Writes a model's parameters in another format, or for another size of images.

    What is known of them goes along: the GELU, how images are made, the classes. It is
    in the header of a safetensors file, in config.json, or in a .json beside an npz.

    Args:
      target: a file ending in .npz or .safetensors, or a folder.
      to: "npz", the published layout; "timm" or "mlp-mixer-pytorch", safetensors for
        these packages of PyTorch; "hf", a folder for the Hugging Face hub and timm.
        Default: npz or timm, by the ending of the target.
      gelu: the GELU that the parameters were trained with. Default: what is known of
        the model.
      mean: of the images, as in evaluate.
      std: of the images, as in evaluate.
      class_names: as in evaluate.
      image_size: size of the images in pixels, such as 224 or 320x224 (height x
        width). Default: what the model is for. For another size its parameters are
        adapted.
      resolution: how they are adapted: interpolate for any size; block_diagonal for
        whole multiples, as in the paper.
    """
    usual = {".npz": "npz", ".safetensors": "timm"}
    kind = to or usual.get(target.suffix)
    if kind is None:
        raise UsageError(
            f"{target} ends in neither .npz nor .safetensors. For a folder: --to hf"
        )
    ending = {"npz": ".npz", "hf": None}.get(kind, ".safetensors")
    if ending != (target.suffix if target.suffix in usual else None):
        expected = f"a file that ends in {ending}" if ending else "a folder"
        raise UsageError(f"{target}: --to {kind} writes {expected}.")
    check_std(std)
    loaded = load_model(
        model,
        gelu=gelu,
        mean=mean,
        std=std,
        class_names=class_names,
        image_size=image_size,
        resolution=resolution,
    )
    about = about_model(loaded.model, loaded.transform, loaded.class_names)
    if loaded.transform.permute:
        print("The model expects permuted pixels (pp.permute), which no file can say.")
    if kind == "npz":
        save_checkpoint(target, loaded.params)
        write_beside(target, about)
    elif kind == "hf":
        save_folder(
            target,
            loaded.params,
            {**PUBLISHED_FIELDS, **about.fields},  # a fork may lack some
            loaded.transform,
            loaded.class_names,
            card_facts(loaded, model),
        )
    else:
        save_pytorch(target, loaded.params, kind, about)
    files = sorted(target.iterdir()) if kind == "hf" else [target]
    for file in files:
        print(f"{file}: {file.stat().st_size:,} bytes")
    if kind == "npz":
        print(f"{beside(target)}: what is known of them. It belongs to {target.name}")
    if image_size:
        crop = str(as_value(image_size)).replace(" ", "")
        options = [f"--config.pp.crop={shlex.quote(crop)}"]
        if resolution == "block_diagonal" and hasattr(loaded.model, "tokens_mlp_dim"):
            units = loaded.model.tokens_mlp_dim
            options.append(f"--config.model.tokens_mlp_dim={units}")
        print(f"Train from it with {' '.join(options)}.")


@app.command
def checkpoints() -> None:
    """Lists the published checkpoints."""
    rows = [("name", "model", "classes", "MB", "ImageNet top-1", "cached")]
    for name, file in PUBLISHED.items():
        sizes = file.sizes
        top1 = f"{file.paper_top1:.2f} %" if file.paper_top1 else "-"
        megabytes = f"{file.num_bytes / 1e6:.0f}"
        cached = "yes" if is_cached(name) else "no"
        variant, classes = str(sizes.variant.name), str(sizes.num_classes)
        rows.append((name, variant, classes, megabytes, top1, cached))
    print_table(rows, "<<>>><")
    print(
        "\nTop-1 is the paper's, Table 3: fine-tuned on ImageNet at 224 pixels after "
        "the pre-training\nthat the folder names. No measurement of these files. They "
        f"are kept in\n{cache_dir()}"
    )


@app.command
def inspect(model: Model) -> None:
    """Prints a model's sizes and its parameters. Fetches no published file."""
    if name := published_name(model):
        sizes, known = PUBLISHED[name].sizes, open_weights(name).about.fields
        shapes = sizes.shapes()
    elif find_workdir(model) is None:  # it need not say the size of its images
        weights = read_weights(model)
        sizes = infer_model(weights.params, weights.where)
        if weights.transform:
            grid = count_patches(weights.transform.crop, sizes.variant.patches.size)
            sizes = dataclasses.replace(sizes, grid=grid)
        known, shapes = (
            {**PUBLISHED_FIELDS, **weights.fields},
            shapes_of(weights.params),
        )
    else:
        loaded = load_model(model)
        num_classes = loaded.model.num_classes or None
        sizes = sizes_of(loaded.model, num_classes, loaded.transform.crop)
        known = about_model(loaded.model, loaded.transform, None).fields
        shapes = shapes_of(loaded.params)
    counts = {key: math.prod(shape) for key, shape in shapes.items()}
    total, head = sum(counts.values()), sum(counts[k] for k in counts if is_head(k))
    classes = f"{sizes.num_classes} classes" if sizes.num_classes else "none"
    computes = [f"{key} {x}" for key, x in known.items() if key != "model_name"]
    print(f"model       {sizes}")
    print(f"computes    {', '.join(computes) or '-'}")
    print(f"parameters  {total:,}, {total - head:,} without the head")
    print(f"head        {classes}\n")
    listed = [
        key
        for key, shape in shapes.items()
        if not block_of(key) or shape != shapes.get(in_block(key, 0))
    ]
    shape_of = {key: " x ".join(map(str, shapes[key])) for key in listed}
    print_table([(key, shape_of[key], f"{counts[key]:,}") for key in listed], "<<>")
    if last := max(block_of(key) or 0 for key in shapes):
        others = ", but for those listed" if any(map(block_of, listed)) else ""
        print(f"\nMixerBlock_1 to MixerBlock_{last} are as MixerBlock_0{others}.")
