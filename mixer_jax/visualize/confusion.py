"""Which classes a model takes for which."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from mixer_jax.visualize.show import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_confusion_matrix(matrix: np.ndarray, class_names: Sequence[str]) -> "Figure":
    """Draws int [classes, classes], by label and prediction."""
    from matplotlib.figure import Figure  # over a second to import

    n = len(class_names)
    side = 2.5 + 0.35 * n
    axes = (figure := Figure((side, side), layout="constrained")).add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [plain(name) for name in class_names]
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    axes.set(
        xlabel="predicted",
        ylabel="true",
        title="number of images; shade: share of the true class",
    )
    for row, column in zip(*np.nonzero(matrix), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        number = str(matrix[row, column])
        axes.text(column, row, number, ha="center", va="center", color=color, size=7)
    return figure
