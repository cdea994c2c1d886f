"""What one does with files of parameters: convert, checkpoints, inspect."""

import math
import pathlib
import shlex
from typing import Literal

from tyro.conf import Positional

from mixer_jax.cli.app import UsageError, app, print_table
from mixer_jax.cli.models import ImageSize, Model, Resolution
from mixer_jax.data.sizes import as_value
from mixer_jax.run.loading import load_model
from mixer_jax.weights.layout import shapes_of, sizes_of
from mixer_jax.weights.names import block_of, in_block, is_head
from mixer_jax.weights.npz import save_checkpoint
from mixer_jax.weights.published import (
    PUBLISHED,
    cache_dir,
    is_cached,
    published_name,
)
from mixer_jax.weights.timm import save_timm


@app.command
def convert(
    model: Model,
    target: Positional[pathlib.Path],
    gelu: Literal["tanh", "erf"] | None = None,
    image_size: ImageSize = None,
    resolution: Resolution = "interpolate",
) -> None:
    """Writes a model's parameters in another format, or for another size of images.

    Args:
      target: a file ending in .npz (the published layout) or .safetensors (timm's).
      gelu: the GELU that the parameters were trained with. Default: what the run or
        the safetensors file says; "tanh" for npz files.
      image_size: size of the images in pixels, such as 224 or 320x224 (height x
        width). Default: what the model is for. For another size its parameters are
        adapted.
      resolution: how they are adapted: interpolate for any size; block_diagonal for
        whole multiples, as in the paper.
    """
    if target.suffix not in (".npz", ".safetensors"):
        raise UsageError(f"{target} ends in neither .npz nor .safetensors.")
    loaded = load_model(model, gelu=gelu, image_size=image_size, resolution=resolution)
    gelu_of_model = loaded.model.gelu
    if target.suffix == ".npz":
        save_checkpoint(target, loaded.params)
    else:
        save_timm(target, loaded.params, gelu=gelu_of_model)
    print(f"{target}: {target.stat().st_size:,} bytes")
    if image_size:
        crop = str(as_value(image_size)).replace(" ", "")
        options = [f"--config.pp.crop={shlex.quote(crop)}"]
        if resolution == "block_diagonal" and hasattr(loaded.model, "tokens_mlp_dim"):
            units = loaded.model.tokens_mlp_dim
            options.append(f"--config.model.tokens_mlp_dim={units}")
        print(f"Train from it with {' '.join(options)}.")
    if target.suffix == ".npz" and gelu_of_model == "erf":
        print("An npz file cannot say that these parameters need the exact GELU.")
        print(
            "Give --gelu erf wherever you use it, and train.py --config.model.gelu=erf."
        )


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
        sizes, gelu = PUBLISHED[name].sizes, "tanh"
        shapes = sizes.shapes()
    else:
        loaded = load_model(model)
        num_classes = loaded.model.num_classes or None
        sizes = sizes_of(loaded.model, num_classes, loaded.transform.crop)
        gelu = loaded.model.gelu
        shapes = shapes_of(loaded.params)
    counts = {key: math.prod(shape) for key, shape in shapes.items()}
    total, head = sum(counts.values()), sum(counts[k] for k in counts if is_head(k))
    classes = f"{sizes.num_classes} classes" if sizes.num_classes else "none"
    print(f"model       {sizes}, {gelu} GELU")
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
