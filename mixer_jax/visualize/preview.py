"""What the model will see: images in training and in the test."""

import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from mixer_jax.data.dataset import NO_LABEL, Source, readable
from mixer_jax.data.preprocess import EvalTransform, TrainTransform
from mixer_jax.visualize.show import displayable, plain, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

T = TypeVar("T")


def draw_preview(
    *,
    title: str,
    train_source: Source,
    test_source: Source,
    train_transform: TrainTransform,
    eval_transform: EvalTransform,
    class_names: Sequence[str],
    seed: int = 0,
    num_rows: int = 6,
) -> "Figure":
    """Draws what the model will see, with labels.

    Args:
      title: of the figure.
      train_source: each row on the left is one of its images, augmented four times.
      test_source: on the right are three of its images a row.
      train_transform: see `mixer_jax.data.preprocess`.
      eval_transform: see `mixer_jax.data.preprocess`.
      class_names: of the labels.
      seed: of the choice of images and of their augmentation.
      num_rows: as many as there are images for, at most.
    """
    from matplotlib.figure import Figure  # over a second to import

    rng = np.random.default_rng(seed)

    def augment(image: np.ndarray) -> list[np.ndarray]:
        return [train_transform(image, rng) for _ in range(4)]

    augmented = [
        (labels, displayable(image, train_transform))
        for labels, images in _choose(train_source, num_rows, rng, augment)
        for image in images
    ]
    tested = [
        (labels, displayable(image, eval_transform))
        for labels, image in _choose(test_source, 3 * num_rows, rng, eval_transform)
    ]
    rows = max(-(-len(augmented) // 4), -(-len(tested) // 3), 1)
    figure = Figure((13, 0.9 + 1.95 * rows), layout="constrained")
    figure.suptitle(plain(title))
    parts: Any = figure.subfigures(1, 2, width_ratios=(4, 3), wspace=0.04)
    for part, images, columns, heading in (
        (parts[0], augmented, 4, "training: four augmentations of each image"),
        (parts[1], tested, 3, "test"),
    ):
        part.suptitle(heading, color="dimgray")
        grid = list(part.subplots(rows, columns, squeeze=False).flat)
        for axes in grid:
            axes.set_axis_off()
        for axes, (labels, image) in zip(grid, images, strict=False):
            axes.imshow(image, interpolation="nearest")
            name = ", ".join(class_names[label] for label in labels)
            axes.set_title(plain(shortened(name or NO_LABEL, 22)), size=9)
    return figure


def _choose(
    source: Source,
    count: int,
    rng: np.random.Generator,
    transform: Callable[[np.ndarray], T],
) -> list[tuple[tuple[int, ...], T]]:
    """Draws images at random, of as many classes as possible, and transforms them.

    Returns:
      Labels and what the transform made, in the order of the labels.
    """
    size = min(len(source), 20 * count)
    drawn = [source[int(i)] for i in rng.choice(len(source), size, replace=False)]
    seen: Counter[tuple[int, ...]] = Counter()
    ranks = []
    for example in drawn:
        ranks.append(seen[example.labels])
        seen[example.labels] += 1
    order = (drawn[i] for i in np.argsort(ranks, kind="stable"))
    chosen = [
        (example.labels, transform(image))
        for example, image in itertools.islice(readable(order), count)
    ]
    return sorted(chosen, key=lambda x: x[0])
