"""Many small images of one size in rows."""

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# White or light pixels must not run into the white page.
FRAME: Any = {"fill": False, "edgecolor": "darkgray", "linewidth": 0.5}

T = TypeVar("T")
GAP_IN_GROUP, GAP, LABEL = 0.08, 0.35, 0.38  # in heights of an image


@dataclasses.dataclass(frozen=True)
class Tiles:
    """Rows of groups of images. Lengths are in heights of an image.

    Attributes:
      aspect: width of an image.
      group: images that stand close together.
      columns: groups in a row.
      labels: whether there is a text below each group.
    """

    aspect: float
    group: int
    columns: int
    labels: bool

    @property
    def pitch(self) -> tuple[float, float]:
        """From a row to the next one, and from a group to the next one."""
        gap = GAP if self.group > 1 else GAP_IN_GROUP
        below = LABEL if self.labels else gap
        return 1 + below, self.group * (self.aspect + GAP_IN_GROUP) - GAP_IN_GROUP + gap

    def top(self, i: int) -> float:
        """Where the i-th group begins."""
        return i // self.columns * self.pitch[0]

    def ratio(self, count: int) -> float:
        """Height of `count` groups, for a width of 1."""
        return -(-count // self.columns) * self.pitch[0] / self.columns / self.pitch[1]

    def draw(
        self,
        axes: "Axes",
        groups: Sequence[Sequence[np.ndarray]],
        labels: Sequence[str] = (),
        **show: Any,
    ) -> None:
        """Draws groups of images; `show` are arguments of imshow."""
        from matplotlib.patches import Rectangle  # over a second to import

        for i, images in enumerate(groups):
            top, left = self.top(i), i % self.columns * self.pitch[1]
            if labels:
                middle = left + (self.group * (self.aspect + GAP_IN_GROUP)) / 2
                axes.text(middle, top + 1.06, labels[i], size=7, ha="center", va="top")
            for image in images:
                extent = (left, left + self.aspect, top + 1, top)
                axes.imshow(image, extent=extent, interpolation="nearest", **show)
                frame = Rectangle((left, top), self.aspect, 1, **FRAME)
                axes.add_patch(frame)
                left += self.aspect + GAP_IN_GROUP
        rows = -(-len(groups) // self.columns)
        axes.set(
            xlim=(-0.02, self.columns * self.pitch[1]),
            ylim=(rows * self.pitch[0], -0.02),
            anchor="N",
            xticks=[],
            yticks=[],
        )
        axes.tick_params(length=0, labelsize=8)
        axes.spines[:].set_visible(False)


def spread(items: Sequence[T], count: int) -> list[T]:
    """Returns `count` of the items, evenly spaced, with the first and the last."""
    if len(items) <= count:
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
