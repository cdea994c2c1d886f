"""How runs went: their metrics by step."""

import itertools
import os
import pathlib
import re
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from mixer_jax.training.rows import read_rows
from mixer_jax.visualize.show import plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def draw_runs(workdirs: Sequence[str | os.PathLike[str]]) -> "Figure":
    """Draws the metrics of runs by step: a panel a metric.

    A color stands for a run, which is named after its folder, and a kind of line for
    what it was measured on, such as train or test. In the panel of few-shot accuracies
    a marker stands for the number of shots. A run may still be going on.

    Args:
      workdirs: of the runs.

    Raises:
      FileNotFoundError: a folder has no metrics.jsonl.
      ValueError: that file is damaged, or no run has any metrics yet.
    """
    from matplotlib import color_sequences
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    folders = [pathlib.Path(workdir).resolve() for workdir in workdirs]
    same_names = Counter(folder.name for folder in folders)
    runs = {
        plain(folder.name if same_names[folder.name] == 1 else folder): read_metrics(
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
    # The first is made for colour-blind people, but has ten colours only.
    palette = color_sequences["petroff10" if len(runs) <= 10 else "tab20"]
    colors = dict(zip(runs, itertools.cycle(palette), strict=False))

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
    return figure


def _panel(metric: str) -> str:
    """Returns the key of the panel of a metric: all few-shot accuracies share one."""
    return "shot" if re.fullmatch(r"\d+shot", metric) else metric


Curves = dict[tuple[str, str], list[tuple[int, float]]]


def read_metrics(workdir: pathlib.Path) -> Curves:
    """Reads <workdir>/metrics.jsonl as points (step, value) by (split, metric).

    Raises:
      FileNotFoundError, MetricsError: as `read_rows`.
    """
    curves: Curves = {}
    for row in read_rows(workdir / "metrics.jsonl"):
        step = int(row.pop("step"))
        for name, value in row.items():
            split, _, metric = name.rpartition("/")
            curves.setdefault((split, metric), []).append((step, value))
    return curves
