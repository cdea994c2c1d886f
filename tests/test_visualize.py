import dataclasses
import functools
import json
import os

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.axes import Axes

from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.decode import decode
from mixer_jax.data.preprocess import EvalTransform, TrainTransform
from mixer_jax.files import FileError
from mixer_jax.run.loading import LoadedModel
from mixer_jax.variants import Patches
from mixer_jax.visualize import (
    draw_confusion_matrix,
    draw_mixing,
    draw_preview,
    draw_runs,
    draw_weights,
    save_figure,
)
from mixer_jax.visualize.activations import unit_activations
from mixer_jax.visualize.influence import Block, capture_block, token_influence
from mixer_jax.visualize.runs import read_metrics
from mixer_jax.visualize.weights import mean_frequency, pair_units
from mixer_jax.weights.layout import CheckpointError

from .examples import import_gating_fork, write_folder, write_mixed_folder


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


def test_a_figure_that_is_drawn_again_is_the_same_file_as_png_and_as_svg(tmp_path):
    for i, ending in enumerate((".png", ".png", ".svg", ".svg", ".SVG")):
        figure = draw_confusion_matrix(np.array([[3, 1], [0, 5]]), ["ant", "bee"])
        save_figure(figure, tmp_path / f"{i}{ending}")
    png, again, svg, *others = (x.read_bytes() for x in sorted(tmp_path.iterdir()))
    assert png.startswith(b"\x89PNG")
    assert again == png
    assert b"<svg" in svg[:1000]
    assert others == [svg, svg]
    assert b"<dc:date>" not in svg


def test_a_figure_of_another_kind_is_refused(tmp_path):
    figure = draw_confusion_matrix(np.eye(2, dtype=int), ["ant", "bee"])
    with pytest.raises(FileError, match=r"a.pdf ends in neither .png nor .svg"):
        save_figure(figure, tmp_path / "a.pdf")
    assert not list(tmp_path.iterdir())


def waves(grid, *cycles):
    """Images [n, height, width] of so many cycles (down, across) each."""
    y, x = np.mgrid[: grid[0], : grid[1]]
    phases = [2 * np.pi * (a * y / grid[0] + b * x / grid[1]) for a, b in cycles]
    return np.cos(phases).astype("float32")


def test_the_frequency_of_a_wave_is_its_own():
    images = waves((4, 8), (0, 0), (1, 0), (0, 1), (0, 3), (2, 4))
    expected = [0, 1 / 4, 1 / 8, 3 / 8, np.sqrt(1 / 2)]
    np.testing.assert_allclose(mean_frequency(images), expected, atol=1e-6)
    # Of a sum of two waves it is the mean, weighted with their power.
    both = images[1] + 3 * images[3]
    assert mean_frequency(both) == pytest.approx((1 / 4 + 9 * 3 / 8) / 10)
    assert mean_frequency(np.zeros((3, 3))) == 0


def test_units_are_paired_with_their_inverses_from_low_to_high_frequency():
    grid = (4, 6)
    images = waves(grid, (2, 0), (0, 0), (0, 1), (1, 1))
    # Unit 3 is the inverse of unit 0, and so on; the last one has none.
    kernel = np.concatenate([images, -2 * images, images[:1]])
    kernel = kernel.reshape(9, 24).T
    pairs = pair_units(kernel, grid)
    assert [set(pair.units) for pair in pairs] == [{1, 5}, {2, 6}, {3, 7}, {0, 4}]
    assert pairs[0].units == (1, 5)  # the first is the one of positive weight
    np.testing.assert_allclose([pair.cosine for pair in pairs], -1, atol=1e-6)
    np.testing.assert_allclose(
        [pair.frequency for pair in pairs],
        [0, 1 / 6, np.hypot(1 / 4, 1 / 6), 1 / 2],
        atol=1e-6,
    )


def images_in(axes):
    return [np.asarray(x.get_array()) for x in axes.images]


def drawn_axes(figure):
    return {axes.get_title(): axes for axes in figure.findobj(Axes) if axes.images}


def test_weights_show_units_as_grids_and_filters_as_patches(loaded, tmp_path):
    figure = draw_weights(loaded, title="the model", num_pairs=2, num_filters=5)
    save_figure(figure, tmp_path / "a.svg")
    axes = drawn_axes(figure)
    assert list(axes) == ["block 0: 4 of 6 units", "block 1: 4 of 6 units", ""]
    kernel = loaded.params["MixerBlock_1"]["token_mixing"]["Dense_0"]["kernel"]
    pairs = pair_units(kernel, (4, 4))
    drawn = images_in(axes["block 1: 4 of 6 units"])
    chosen = (*pairs[0].units, *pairs[2].units)  # the first and the last
    for n, image in zip(chosen, drawn, strict=True):
        unit = kernel[:, n].reshape(4, 4)
        np.testing.assert_allclose(image, unit / np.abs(unit).max(), rtol=1e-6)
    filters = images_in(axes[""])
    assert {x.shape for x in filters} == {(4, 4, 3)}
    assert len(filters) == 5
    for image in filters:  # zero is in the middle, the largest weight at an end
        assert max(image.max(), 1 - image.min()) == pytest.approx(1)
    texts = texts_of(figure)
    assert "Weights of the model" in texts
    labels = [f"{x.units[0]}, {x.units[1]}: {x.cosine:.2f}" for x in pairs]
    assert labels[0] in texts
    assert labels[2] in texts
    assert labels[1] not in texts


def test_weights_of_images_that_are_not_square(loaded):
    wide = dataclasses.replace(loaded, transform=EvalTransform((8, 32)))
    (axes,) = (
        x for x in drawn_axes(draw_weights(wide, blocks=[1])).values() if x.get_title()
    )
    left, right, bottom, top = axes.images[0].get_extent()
    assert images_in(axes)[0].shape == (2, 8)
    assert right - left == pytest.approx(4 * (bottom - top))


def test_weights_that_are_not_there(loaded):
    with pytest.raises(CheckpointError, match="no MixerBlock_2/token_mixing/Dense_0/k"):
        draw_weights(loaded, blocks=[0, 2])
    small = dataclasses.replace(loaded, transform=EvalTransform(8))
    with pytest.raises(CheckpointError, match=r"for 16 tokens.*have 2 x 2 patches"):
        draw_weights(small)


@pytest.fixture(scope="module")
def fork(tmp_path_factory):
    """A model of docs/fork.md, which has no token-mixing MLP."""
    gating = import_gating_fork(tmp_path_factory.mktemp("fork") / "gating")
    model = gating.MlpMixer(Patches((4, 4)), 3, 2, 10, 0, 20)
    images = np.zeros((1, 8, 16, 3), "float32")
    init = functools.partial(model.init, train=False)
    shapes = jax.eval_shape(init, jax.random.key(0), images)
    noise = lambda x: np.random.default_rng(1).normal(0, 0.3, x.shape).astype("float32")
    return LoadedModel(
        model, jax.tree.map(noise, shapes["params"]), EvalTransform((8, 16))
    )


def test_weights_of_a_fork_without_token_mixing(fork):
    figure = draw_weights(fork)
    message = "No hidden units: the blocks have no MixerBlock_*/token_mixing/Dense_0/k"
    assert [x for x in texts_of(figure) if x.startswith(message)]
    (axes,) = drawn_axes(figure).values()
    assert len(axes.images) == 10


@pytest.mark.parametrize("name", ["loaded", "fork"])
def test_influence_is_the_norm_of_the_jacobian(name, request):
    loaded = request.getfixturevalue(name)
    image = np.random.default_rng(0).integers(0, 256, (*loaded.transform.crop, 3))
    block = capture_block(loaded, image.astype("uint8"), 1)
    apply = functools.partial(
        loaded.model.apply, train=False, capture_intermediates=True, mutable=True
    )
    _, state = jax.jit(apply)({"params": loaded.params}, (image[None] - 127.5) / 127.5)
    output = jax.jit(block.function)(block.variables, block.inputs)
    (expected,) = state["intermediates"]["MixerBlock_1"]["__call__"]
    np.testing.assert_allclose(output, expected[0], rtol=1e-4, atol=1e-4)

    function = functools.partial(block.function, block.variables)
    jacobian = jax.jit(jax.jacobian(function))(block.inputs)
    channels = block.inputs.shape[1]
    norms = np.sqrt(np.square(jacobian).sum((1, 3)) / channels)
    tokens = [0, 5, 7]
    np.testing.assert_allclose(token_influence(block, tokens), norms[tokens], rtol=1e-4)
    # Half of the directions give about the same.
    estimate = token_influence(block, tokens, channels // 2)
    assert 0.01 < np.abs(estimate / norms[tokens] - 1).mean() < 0.2


def test_influence_of_a_block_that_hands_tokens_on():
    block = Block(lambda _, x: x[::-1], None, jnp.ones((4, 100)))
    influence = token_influence(block, [0])
    np.testing.assert_allclose(influence, [[0, 0, 0, 1]], atol=1e-5)


def test_activations_are_those_of_the_first_layer_of_the_token_mixing_mlp(loaded):
    images = np.random.default_rng(0).integers(0, 256, (20, 16, 16, 3), "uint8")
    found = unit_activations(loaded, images[0], 0, iter(images))
    params = loaded.params
    patches = (images[:20] / 127.5 - 1).reshape(20, 4, 4, 4, 4, 3)
    x = np.einsum("nhywxc,yxcd->nhwd", patches, params["stem"]["kernel"])
    x = x.reshape(20, 16, 12) + params["stem"]["bias"]
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    norm, dense = (
        params["MixerBlock_0"]["LayerNorm_0"],
        params["MixerBlock_0"]["token_mixing"]["Dense_0"],
    )
    x = x * norm["scale"] + norm["bias"]
    hidden = np.einsum("nsc,su->ncu", x, dense["kernel"]) + dense["bias"]
    np.testing.assert_allclose(found.of_images, hidden.max(1), rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.of_image, found.of_images[0], rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.images, images)


def test_mixing_shows_maps_and_the_images_that_activate_units_most(loaded, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 16, 16, 3), "uint8")
    figure = draw_mixing(
        loaded,
        images[3],
        title="a run",
        block=1,
        tokens=[(1, 2), (0, 3)],
        units=[4, 2],
        images=images,
    )
    save_figure(figure, tmp_path / "a.png")
    axes = [x for x in figure.findobj(Axes) if x.images]
    block = capture_block(loaded, images[3], 1)
    maps = token_influence(block, [6, 3]).reshape(2, 4, 4)
    assert (
        axes[1].get_title() == f"A: row 1, column 2\nfrom itself: {maps[0, 1, 2]:.2f}"
    )
    for values, token, panel in zip(maps, ((1, 2), (0, 3)), axes[1:3], strict=True):
        values[token] = np.nan  # drawn in grey
        drawn = np.ma.filled(panel.images[0].get_array(), np.nan)
        np.testing.assert_allclose(drawn, values, rtol=1e-5)

    found = unit_activations(loaded, images[3], 1, images)
    row = [x for x in axes if x.get_title().startswith("unit 4")]
    assert row[0].get_title() == f"unit 4: this image {found.of_image[4]:.2f}"
    first = axes[axes.index(row[0]) + 1]
    best = found.of_images[:, 4].argmax()
    assert first.get_title() == f"{found.of_images[best, 4]:.2f}"
    np.testing.assert_array_equal(first.images[0].get_array(), images[best])


def test_mixing_chooses_the_units_that_stand_out(loaded):
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (40, 16, 16, 3), "uint8")
    found = unit_activations(loaded, images[0], 0, images)
    surplus = found.of_image - found.of_images.mean(0)
    best = (surplus / found.of_images.std(0)).argmax()
    titles = texts_of(draw_mixing(loaded, images[0], images=images))
    assert next(x for x in titles if x.startswith("unit")).startswith(f"unit {best}:")


def test_mixing_says_why_units_are_not_shown(loaded, fork):
    image = np.zeros((30, 50, 3), "uint8")
    assert any(
        "No images to compare with" in x for x in texts_of(draw_mixing(loaded, image))
    )
    figure = draw_mixing(fork, image, block=1, images=[image])
    texts = texts_of(figure)
    assert any("no MixerBlock_1/token_mixing/Dense_0/kernel" in x for x in texts)
    assert {"A", "B", "C", "D"} <= set(texts)
    assert [x.images[0].get_array().shape for x in figure.findobj(Axes) if x.images][
        1:5
    ] == 4 * [(2, 4)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokens": [(0, 4)]}, "no token in row 0, column 4: the image has 4 x 4"),
        ({"tokens": [(0, 0)] * 9}, "9 output tokens; there is room for 1 to 8"),
        ({"block": 2}, "no block of the name MixerBlock_2. It has 2: Mix"),
        ({"units": [6]}, "no hidden unit 6: there are 0 to 5"),
        ({"images": []}, "no images to compare with"),
    ],
)
def test_mistakes_in_mixing(loaded, arguments, message):
    image = np.zeros((16, 16, 3), "uint8")
    with pytest.raises(ValueError, match=message):
        draw_mixing(loaded, image, **{"images": [image], **arguments})
