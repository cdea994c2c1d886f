import json
import os

import cv2
import numpy as np
import pytest

from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.decode import decode
from mixer_jax.data.preprocess import EvalTransform, TrainTransform
from mixer_jax.visualize import (
    draw_confusion_matrix,
    draw_preview,
    draw_runs,
    save_figure,
)
from mixer_jax.visualize.runs import read_metrics

from .examples import write_folder, write_mixed_folder


def write_run(workdir, steps=40, end=""):
    """Metrics as a run writes them."""
    workdir.mkdir(parents=True)
    rows = [
        {
            "step": step,
            "train/loss": 1 / step,
            "train/learning_rate": 1e-3,
            "train/images_per_sec": 100.0,
        }
        for step in range(10, steps + 1, 10)
    ]
    rows.append({"step": steps, "test/top1": 0.5, "test/loss": 0.1, "test/count": 8.0})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text + end)
    return workdir


def test_metrics_of_a_run_that_is_being_written(tmp_path):
    whole = read_metrics(write_run(tmp_path / "a"))
    assert whole["train", "loss"] == [(10, 0.1), (20, 0.05), (30, 1 / 30), (40, 0.025)]
    assert whole["test", "top1"] == [(40, 0.5)]
    assert read_metrics(write_run(tmp_path / "b", end='{"step": 50, "tr')) == whole


def test_damaged_metrics_name_file_and_line(tmp_path):
    workdir = write_run(tmp_path / "a", end="no JSON\n{}\n")
    with pytest.raises(ValueError, match=r"a/metrics.jsonl, line 6: found 'no JSON'"):
        read_metrics(workdir)
    with pytest.raises(FileNotFoundError, match=r"Is .*nowhere a run's workdir"):
        read_metrics(tmp_path / "nowhere")


def texts_of(figure):
    from matplotlib.text import Text

    return [x.get_text() for x in figure.findobj(Text)]


def test_runs_are_drawn_with_their_names(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("one", "x/two", "y/two")]
    texts = texts_of(draw_runs(runs))
    # Folders of the same name are told apart by their paths.
    assert {"one", str(runs[1]), str(runs[2]), "train", "test"} <= set(texts)
    titles = ["loss", "top-1 accuracy", "learning rate", "images per second"]
    assert [text for text in texts if text in titles] == titles
    assert "count" not in texts


def test_few_shot_accuracies_share_a_panel_in_the_order_of_their_shots(tmp_path):
    def draw(probes):
        workdir = write_run(tmp_path / f"{len(probes)}", end="")
        with (workdir / "metrics.jsonl").open("a") as file:
            for step in (20, 40):
                row = {"step": step, "train/epoch": step / 7, "train/param_norm": 1.0}
                row |= {
                    f"{x}/{n}shot": n / step for x in probes for n in (10, 1, 25, 5)
                }
                file.write(json.dumps(row) + "\n")
        figure = draw_runs([workdir])
        return {axes.get_title(): axes for axes in figure.axes if axes.axison}

    panels = draw(["pets"])
    assert list(panels) == [
        *("loss", "top-1 accuracy", "few-shot accuracy", "learning rate"),
        *("parameter norm", "images per second"),
    ]
    axes = panels["few-shot accuracy"]
    texts = [x.get_text() for x in axes.get_legend().get_texts()]
    assert texts == ["1-shot", "5-shot", "10-shot", "25-shot"]
    # Each line has the marker that the legend gives for its values.
    markers = [x.get_marker() for x in axes.get_legend().legend_handles]
    drawn = {x.get_marker(): x.get_ydata()[-1] for x in axes.lines}
    assert [drawn[marker] for marker in markers] == [1 / 40, 5 / 40, 10 / 40, 25 / 40]
    # Of several probes the kind of line says which.
    axes = draw(["pets", "cars"])["few-shot accuracy"]
    texts = [x.get_text() for x in axes.get_legend().get_texts()]
    assert texts[4:] == ["cars", "pets"]
    assert {x.get_linestyle() for x in axes.lines} == {"-", "--"}


def test_names_are_drawn_as_they_are(tmp_path):
    """Matplotlib reads $x$ as mathematics, and has no letters for raw bytes."""
    run = write_run(tmp_path / os.fsdecode(b"caf\xe9 $5 bill$"))
    names = ["$\\frac", r"\$1 and $2", os.fsdecode(b"th\xe9")]
    figures = [draw_runs([run]), draw_confusion_matrix(np.eye(3, dtype=int), names)]
    for i, figure in enumerate(figures):
        save_figure(figure, tmp_path / f"{i}.png")
        assert (tmp_path / f"{i}.png").exists()
    assert r"caf\xe9 \$5 bill\$" in texts_of(figures[0])  # \$ is shown as $
    assert r"th\xe9" in texts_of(figures[1])


def test_runs_without_metrics(tmp_path):
    workdir = tmp_path / "new"
    workdir.mkdir()
    (workdir / "metrics.jsonl").touch()
    with pytest.raises(ValueError, match="no metrics yet"):
        draw_runs([workdir])


@pytest.mark.parametrize("transfer", ["uint8", "float32"])
def test_preview_shows_labels_and_leaves_damaged_images_out(tmp_path, transfer):
    write_mixed_folder(tmp_path / "photos", 40, 20)
    dataset = open_dataset(str(tmp_path / "photos"))
    figure = draw_preview(
        title="the title",
        train_source=dataset.split("train"),
        test_source=dataset.split("test"),
        train_transform=TrainTransform(24, transfer=transfer),
        eval_transform=EvalTransform(24, transfer=transfer),
        class_names=["temple", "a flower with a very long name"],
        num_rows=2,
    )
    texts = texts_of(figure)
    assert "the title" in texts
    # One training image of each class in four augmentations, and test images.
    assert texts.count("temple") >= 5
    assert texts.count("a flower with a very …") >= 5


def test_preview_names_each_of_several_labels(tfds_dir):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir, label_key="real_label")
    figure = draw_preview(
        title="",
        train_source=dataset.split("train"),
        test_source=dataset.split("test"),
        train_transform=TrainTransform(24),
        eval_transform=EvalTransform(24),
        class_names=dataset.class_names,
    )
    assert {"(no label)", "low", "high", "low, high"} <= set(texts_of(figure))


def test_preview_of_fewer_images_than_there_is_room_for(tmp_path):
    root = write_folder(tmp_path / "photos", {"train/a": 1, "test/a": 1})
    dataset = open_dataset(str(root))
    figure = draw_preview(
        title="",
        train_source=dataset.split("train"),
        test_source=dataset.split("test"),
        train_transform=TrainTransform(8, (1, 1), (1, 1), flip=False),
        eval_transform=EvalTransform(8),
        class_names=["a"],
    )
    save_figure(figure, tmp_path / "out.png")
    image = cv2.imread(str(tmp_path / "out.png"))
    assert image.shape[1] > image.shape[0]  # one row
    assert len(np.unique(image)) > 10


def test_confusion_matrix_is_drawn(tmp_path):
    matrix = np.array([[3, 1], [0, 5]])
    path = tmp_path / "new" / "matrix.png"
    save_figure(draw_confusion_matrix(matrix, ["ant", "bee"]), path)
    image = decode(path.read_bytes())
    assert min(image.shape[:2]) > 300
    # The diagonal is dark, the empty cell light.
    height, width = image.shape[:2]
    dark = image.astype(int).sum(-1) < 250
    assert dark[: height // 2, : width // 2].sum() > 1000
    assert dark[height // 2 :, width // 2 :].sum() > 1000
    assert [x.name for x in path.parent.iterdir()] == ["matrix.png"]
