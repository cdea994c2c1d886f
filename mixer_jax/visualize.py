"""Figures: what the model will see, and how runs went."""

import itertools
import json
import logging
import os
import pathlib
import re
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

# The panels of a figure of runs, in their order, each with its title. A metric has its
# own, but those of few-shot probes, such as 5shot, share one.
PANEL_TITLES = {
    "loss": "loss",
    "mAP": "mean average precision",
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "shot": "few-shot accuracy",
    "learning_rate": "learning rate",
    "grad_norm": "gradient norm",
    "param_norm": "parameter norm",
    "images_per_sec": "images per second",
}
NOT_DRAWN = {"count", "epoch"}
MARKERS = "osD^vP*X"  # one for each number of shots
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
    what it was measured on, such as train or test. In the panel of few-shot accuracies
    a marker stands for the number of shots. A run may still be going on.

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
    known = list(PANEL_TITLES)
    panels = sorted(
        {_panel(metric) for _, metric in curves if metric not in NOT_DRAWN},
        key=lambda x: (known.index(x) if x in known else len(known), x),
    )
    shots = sorted(
        {metric for _, metric in curves if _panel(metric) == "shot"},
        key=lambda x: int(x.removesuffix("shot")),
    )
    markers = dict(zip(shots, itertools.cycle(MARKERS), strict=False))
    probes = sorted({split for split, metric in curves if metric in markers})
    splits = sorted(
        {split for split, _ in curves}.difference(probes),
        key=lambda x: (x != "train", x != "test", x),
    )
    styles = {
        x: LINE_STYLES[i % len(LINE_STYLES)]
        for names in (splits, probes)
        for i, x in enumerate(names)
    }
    palette: Callable[[int], tuple] = colormaps["tab10" if len(runs) <= 10 else "tab20"]
    colors = {run: palette(i % 20) for i, run in enumerate(runs)}

    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    figure = Figure((4.6 * columns, 3.3 * rows + 0.7), layout="constrained")
    grid = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(grid, panels, strict=False):
        for run, curves_of_run in runs.items():
            for (split, metric), points in curves_of_run.items():
                if _panel(metric) == panel:
                    axes.plot(
                        *zip(*points, strict=True),
                        color=colors[run],
                        linestyle=styles[split],
                        linewidth=1.3,
                        # A single point makes no line.
                        marker=markers.get(metric, "o" if len(points) == 1 else None),
                        markersize=4,
                        markevery=-(-len(points) // 20),
                    )
        axes.set(title=PANEL_TITLES.get(panel, panel), xlabel="step")
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))  # 10k
        axes.grid(alpha=0.3)
        if panel.startswith("top") or panel in ("mAP", "shot"):
            axes.yaxis.set_major_formatter(lambda y, _: f"{100 * y:.4g} %")
        if panel == "shot":
            keys = [
                Line2D([], [], color="black", marker=markers[shot], markersize=4)
                for shot in shots
            ]
            names = [shot.replace("shot", "-shot") for shot in shots]
            if len(probes) > 1:
                keys += [
                    Line2D([], [], color="black", linestyle=styles[probe])
                    for probe in probes
                ]
                names += probes
            axes.legend(keys, names, fontsize="small")
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


def _panel(metric: str) -> str:
    """Returns the key of the panel of a metric: all few-shot accuracies share one."""
    return "shot" if re.fullmatch(r"\d+shot", metric) else metric


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
