"""What names and images look like in every figure."""

import textwrap
from typing import Any

import numpy as np

from mixer_jax.data.names import printable
from mixer_jax.data.preprocess import EvalTransform, TrainTransform

# Colour maps that colour-blind people can read. Zero is white in the diverging one.
DIVERGING = "RdBu_r"
SEQUENTIAL = "cividis"


def write_heading(figure: Any, text: str, inches: float) -> None:
    """Writes a text over a part of a figure, in lines of so many inches at most."""
    lines = textwrap.wrap(text, int(13.5 * inches))
    figure.suptitle("\n".join(lines), size=10, color="dimgray")


def plain(text: object) -> str:
    """Returns a name that Matplotlib shows as it is: it reads $x$ as mathematics."""
    return printable(text).replace("$", r"\$")


def shortened(text: str, length: int) -> str:
    """Cuts what is longer than `length`, and says so by an ellipsis."""
    return text if len(text) <= length else text[: length - 1] + "…"


def displayable(
    image: np.ndarray, transform: TrainTransform | EvalTransform
) -> np.ndarray:
    """Returns as uint8 [..., 3] what a transform returns, which may be scaled."""
    if image.dtype == np.uint8:
        return image
    levels = 255 * (image * np.array(transform.std) + transform.mean)
    return np.rint(levels).clip(0, 255).astype(np.uint8)
