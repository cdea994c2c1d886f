"""The README.md of a folder for the Hugging Face hub: its model card."""

from collections.abc import Mapping
from typing import Any

from mixer_jax.data.names import printable
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.weights.layout import MixerSizes

_CARD = """\
---
library_name: timm
pipeline_tag: image-classification
tags:
- image-classification
- mlp-mixer
- timm
---
# {title}

An MLP-Mixer ([arXiv 2105.01601](https://arxiv.org/abs/2105.01601)), written by
mixer-jax. Only what is known of it stands here.

| | |
|---|---|
{rows}

## Use

In PyTorch, with this folder as FOLDER:

```python
{code}
```

With mixer-jax: `mixer-jax predict FOLDER IMAGE`.
"""


def timm_arguments(fields: Mapping[str, Any]) -> list[str]:
    """Returns the arguments with which timm computes what a model does.

    timm's own Mixer has the exact erf GELU and a LayerNorm epsilon of 1e-6, and a
    config.json cannot say anything else.

    Args:
      fields: the model's `gelu` and `layer_norm_epsilon`.
    """
    arguments = []
    if fields["gelu"] == "tanh":
        arguments.append("act_layer=timm.layers.GELUTanh")
    if (epsilon := fields["layer_norm_epsilon"]) != 1e-6:
        norm = f"functools.partial(torch.nn.LayerNorm, eps={epsilon})"
        arguments.append(f"norm_layer={norm}")
    return arguments


def make_card(
    sizes: MixerSizes,
    fields: Mapping[str, Any],
    transform: EvalTransform,
    note: str | None,
    facts: Mapping[str, str],
) -> str:
    """Returns the text, in Markdown.

    Args:
      sizes: sizes of the model.
      fields: the model's `gelu` and `layer_norm_epsilon`.
      transform: makes the images that the model expects.
      note: how the images that timm makes differ, if they do.
      facts: more rows for the table.
    """
    variant = sizes.variant
    rows = {
        "Model": str(sizes),
        "GELU": {"tanh": "tanh approximation", "erf": "exact"}[fields["gelu"]],
        "LayerNorm epsilon": str(fields["layer_norm_epsilon"]),
        "Images": transform.steps,
        "Mean, standard deviation": f"{transform.mean}, {transform.std}",
        **({"In timm": note} if note else {}),
        **facts,
    }
    arguments = timm_arguments(fields)
    imports = [x for x in ("functools", "torch") if any(x in y for y in arguments)]
    call = ", ".join(['"local-dir:FOLDER"', "pretrained=True", *arguments])
    code = [
        *(f"import {name}" for name in sorted([*imports, "timm"])),
        "from PIL import Image",
        "",
        f"model = timm.create_model({call}).eval()",
        "config = timm.data.resolve_model_data_config(model)",
        "transform = timm.data.create_transform(**config)",
        'image = transform(Image.open("IMAGE").convert("RGB"))',
        "logits = model(image[None])",
    ]
    return _CARD.format(
        title=f"Mixer-{variant.name}" if variant.name else "MLP-Mixer",
        rows="\n".join(f"| {_cell(key)} | {_cell(x)} |" for key, x in rows.items()),
        code="\n".join(code),
    )


def _cell(text: str) -> str:
    """Returns a text in one line, without the marks of Markdown and HTML."""
    line = " ".join(printable(text).split())
    for letter in "\\`*_[]<>|":
        line = line.replace(letter, f"\\{letter}")
    return line
