"""Figures: what the model will see, and how runs went."""

import json
import logging
import os
import pathlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np

from mixer_jax.data.dataset import NO_LABEL, Source
from mixer_jax.data.decode import ImageError
from mixer_jax.data.names import printable
from mixer_jax.data.preprocess import EvalTransform, TrainTransform
from mixer_jax.files import replace_when_whole

logger = logging.getLogger(__name__)

# What the metrics are called in a figure, in the order of its panels.
METRIC_TITLES = {
    "loss": "loss",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "images_per_sec": "images per second",
}
LINE_STYLES: Sequence[Literal["-", "--", ":", "-."]] = ("-", "--", ":", "-.")


def draw_preview(
    path: str | os.PathLike[str],
    *,
    title: str,
    train_source: Source,
    test_source: Source,
    train_transform: TrainTransform,
    eval_transform: EvalTransform,
    class_names: Sequence[str],
    seed: int = 0,
    num_rows: int = 6,
) -> None:
    """Draws what the model will see, with labels, as a PNG file.

    Args:
      path: of the file.
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
    augmented = [
        (labels, train_transform(image, rng))
        for labels, image in _choose(train_source, num_rows, rng)
        for _ in range(4)
    ]
    tested = [
        (labels, eval_transform(image))
        for labels, image in _choose(test_source, 3 * num_rows, rng)
    ]
    rows = max(-(-len(augmented) // 4), -(-len(tested) // 3), 1)
    figure = Figure((13, 0.9 + 1.95 * rows), layout="constrained")
    figure.suptitle(_plain(title))
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
            axes.imshow(_displayable(image), interpolation="nearest")
            name = ", ".join(class_names[label] for label in labels)
            axes.set_title(_plain(_shortened(name or NO_LABEL, 22)), size=9)
    with replace_when_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=110)


def draw_runs(
    path: str | os.PathLike[str], workdirs: Sequence[str | os.PathLike[str]]
) -> None:
    """Draws the metrics of runs by step as a PNG file: a panel a metric.

    A color stands for a run, which is named after its folder, and a kind of line for
    what it was measured on, such as train or test. A run may still be going on.

    Args:
      path: of the file.
      workdirs: of the runs.

    Raises:
      FileNotFoundError: a folder has no metrics.jsonl.
      ValueError: that file is damaged, or no run has any metrics yet.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    folders = [pathlib.Path(workdir).resolve() for workdir in workdirs]
    same_names = Counter(folder.name for folder in folders)
    runs = {
        _plain(folder.name if same_names[folder.name] == 1 else folder): read_metrics(
            folder
        )
        for folder in folders
    }
    curves = {key for curves in runs.values() for key in curves}
    if not curves:
        raise ValueError(
            f"{', '.join(map(str, workdirs))}: no metrics yet. Runs write them every "
            "progress_every and eval_every steps."
        )
    known = list(METRIC_TITLES)
    metrics = sorted(
        {metric for _, metric in curves} - {"count"},
        key=lambda x: (known.index(x) if x in known else len(known), x),
    )
    splits = sorted(
        {split for split, _ in curves}, key=lambda x: (x != "train", x != "test", x)
    )
    styles = {x: LINE_STYLES[i % len(LINE_STYLES)] for i, x in enumerate(splits)}
    palette: Callable[[int], tuple] = colormaps["tab10" if len(runs) <= 10 else "tab20"]
    colors = {run: palette(i % 20) for i, run in enumerate(runs)}

    columns = min(len(metrics), 3)
    rows = -(-len(metrics) // columns)
    figure = Figure((4.6 * columns, 3.3 * rows + 0.7), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(metrics) :]:
        axes.set_axis_off()
    for axes, metric in zip(panels, metrics, strict=False):
        for run, curves_of_run in runs.items():
            for split in splits:
                if points := curves_of_run.get((split, metric)):
                    axes.plot(
                        *zip(*points, strict=True),
                        color=colors[run],
                        linestyle=styles[split],
                        linewidth=1.3,
                        # A single point makes no line.
                        marker="o" if len(points) == 1 else None,
                        markersize=4,
                    )
        axes.set(title=METRIC_TITLES.get(metric, metric), xlabel="step")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k
        axes.grid(alpha=0.3)
        if metric.startswith("top"):
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")
    handles = [Line2D([], [], color=colors[run], label=run) for run in runs]
    handles += [
        Line2D([], [], color="black", linestyle=styles[split], label=split)
        for split in splits
    ]
    longest = max(len(str(handle.get_label())) for handle in handles)
    fitting = max(55 * columns // (longest + 8), 1)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(handles), fitting)
    )
    with replace_when_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=130)


def plot_confusion_matrix(
    path: str | os.PathLike[str], matrix: np.ndarray, class_names: Sequence[str]
) -> None:
    """Draws int [classes, classes], by label and prediction, as a PNG file."""
    from matplotlib.figure import Figure  # over a second to import

    n = len(class_names)
    side = 2.5 + 0.35 * n
    axes = (figure := Figure((side, side), layout="constrained")).add_subplot()
    shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    names = [_plain(name) for name in class_names]
    axes.set_xticks(range(n), names, rotation=90)
    axes.set_yticks(range(n), names)
    axes.set(xlabel="predicted", ylabel="true", title="Examples; shade: share of row")
    for row, column in zip(*np.nonzero(matrix), strict=True):
        color = "white" if shares[row, column] > 0.5 else "black"
        number = str(matrix[row, column])
        axes.text(column, row, number, ha="center", va="center", color=color, size=7)
    with replace_when_whole(path) as partial:
        figure.savefig(partial, format="png", dpi=150)


Curves = dict[tuple[str, str], list[tuple[int, float]]]


def read_metrics(workdir: pathlib.Path) -> Curves:
    """Reads <workdir>/metrics.jsonl as points (step, value) by (split, metric).

    Raises:
      FileNotFoundError: it is not there.
      ValueError: one of its lines is damaged. The last one may be incomplete, as it is
        while the run writes it.
    """
    path = workdir / "metrics.jsonl"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file. Is {workdir} a run's workdir?")
    curves: Curves = {}
    lines = path.read_text("utf-8").splitlines(keepends=True)
    for i, line in enumerate(lines, start=1):
        if not line.endswith("\n"):
            break
        try:
            row: Mapping[str, float] = json.loads(line)
            step = int(row["step"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path}, line {i}: found {_shortened(line.strip(), 60)!r}. Expected "
                'a JSON object with a "step".'
            ) from error
        for name, value in row.items():
            if name != "step":
                split, _, metric = name.rpartition("/")
                curves.setdefault((split, metric), []).append((step, value))
    return curves


def _choose(
    source: Source, count: int, rng: np.random.Generator
) -> list[tuple[tuple[int, ...], np.ndarray]]:
    """Draws images and their labels at random, of as many classes as possible."""
    size = min(len(source), 20 * count)
    drawn = [source[int(i)] for i in rng.choice(len(source), size, replace=False)]
    seen: Counter[tuple[int, ...]] = Counter()
    ranks = []
    for example in drawn:
        ranks.append(seen[example.labels])
        seen[example.labels] += 1
    chosen: list[tuple[tuple[int, ...], np.ndarray]] = []
    for i in np.argsort(ranks, kind="stable"):
        if len(chosen) == count:
            break
        try:
            chosen.append((drawn[i].labels, drawn[i].pixels()))
        except ImageError as error:
            logger.warning("skipping %s: %s", printable(drawn[i].name), error)
    return sorted(chosen, key=lambda x: x[0])


def _displayable(image: np.ndarray) -> np.ndarray:
    """Makes uint8 of what crosses to the device."""
    if image.dtype == np.uint8:
        return image
    return np.rint(image * 127.5 + 127.5).clip(0, 255).astype(np.uint8)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _plain(text: object) -> str:
    """Returns a name that Matplotlib shows as it is: it reads $x$ as mathematics."""
    return printable(text).replace("$", r"\$")
