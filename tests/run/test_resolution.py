"""Runs that start from a file for another size of images, and models used at one."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.run import loading, trainer
from mixer_jax.run.loading import load_model
from mixer_jax.run.resolution import set_token_units
from mixer_jax.variants import Patches, Variant
from mixer_jax.weights import layout, npz
from mixer_jax.weights.layout import CheckpointError
from mixer_jax.weights.resolution import adapt

from .test_trainer import tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the file "small.npz", of a model for images of 8 pixels."""
    folder = tmp_path_factory.mktemp("pretrained")
    sizes = layout.MixerSizes(Variant(Patches((4, 4)), 1, 16, 8, 16), 4, 10)
    rng = np.random.default_rng(0)
    arrays = {k: rng.standard_normal(s, "float32") for k, s in sizes.shapes().items()}
    npz.save_checkpoint(folder / "small.npz", layout.unflatten(arrays))
    return folder


def config_from(folder, crop, resolution, **overrides):
    return tiny_config(
        pretrained_dir=str(folder),
        resolution=resolution,
        base_lr=1e-30,  # the parameters stay as they were at the start
        total_steps=2,
        eval_every=2,
        checkpoint_every=2,
        **{"model.model_name": "small", "model.num_blocks": 1, "pp.crop": crop},
        **overrides,
    )


def test_block_diagonal_sets_tokens_mlp_dim_and_says_so(folder, tmp_path):
    config = config_from(folder, 16, "block_diagonal")
    trainer.train_and_evaluate(config, tmp_path)
    log = (tmp_path / "train.log").read_text()
    assert "model.tokens_mlp_dim is now 32, not 8: for pp.crop=16" in log
    assert "small.npz by block_diagonal from 2x2 patches to 4x4" in log
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["model"]["tokens_mlp_dim"] == 32
    assert config.model.tokens_mlp_dim == 8  # the caller's config stays

    file, final = (
        npz.read_checkpoint(x / y)
        for x, y in ((folder, "small.npz"), (tmp_path, "final.npz"))
    )
    expected = adapt(file, layout.shapes_of(final), (4, 4), "block_diagonal")
    for key, array in layout.flatten(final).items():
        if not key.startswith("head/"):
            found = layout.flatten(expected)[key]
            np.testing.assert_array_equal(array, found, err_msg=key)
    assert load_model(tmp_path).model.tokens_mlp_dim == 32


@pytest.mark.parametrize(
    ("resolution", "crop", "grid"),
    [("block_diagonal", (8, 16), (2, 4)), ("interpolate", (12, 8), (3, 2))],
)
def test_a_square_file_starts_a_rectangle(folder, tmp_path, resolution, crop, grid):
    config = config_from(folder, crop, resolution)
    trainer.train_and_evaluate(config, tmp_path)
    final = layout.flatten(npz.read_checkpoint(tmp_path / "final.npz"))
    file = npz.read_checkpoint(folder / "small.npz")
    shapes = {key: x.shape for key, x in final.items()}
    expected = layout.flatten(adapt(file, shapes, grid, resolution))
    for key, array in final.items():
        if not key.startswith("head/"):
            np.testing.assert_array_equal(array, expected[key], err_msg=key)
    assert load_model(tmp_path).transform.crop == crop


@pytest.mark.slow
def test_interpolate_takes_any_size(folder, tmp_path):
    config = config_from(folder, 12, "interpolate")
    trainer.train_and_evaluate(config, tmp_path)
    file, final = (
        npz.read_checkpoint(x / y)
        for x, y in ((folder, "small.npz"), (tmp_path, "final.npz"))
    )
    expected = adapt(file, layout.shapes_of(final), (3, 3), "interpolate")
    key = "MixerBlock_0/token_mixing/Dense_1/kernel"
    np.testing.assert_array_equal(
        layout.flatten(final)[key], layout.flatten(expected)[key]
    )
    assert "tokens_mlp_dim is now" not in (tmp_path / "train.log").read_text()


@pytest.mark.slow
def test_the_same_command_continues(folder, tmp_path):
    """It sets tokens_mlp_dim again, and does not need the file for that."""
    config = config_from(folder, 16, "block_diagonal")
    results = trainer.train_and_evaluate(config, tmp_path / "run")
    assert trainer.train_and_evaluate(config, tmp_path / "run") == results
    (folder / "small.npz").rename(folder / "moved.npz")
    try:
        assert trainer.train_and_evaluate(config, tmp_path / "run") == results
        with pytest.raises(FileNotFoundError, match=r"small\.npz"):
            trainer.train_and_evaluate(config, tmp_path / "new")
    finally:
        (folder / "moved.npz").rename(folder / "small.npz")
    config.model.tokens_mlp_dim = 12
    with pytest.raises(trainer.ConfigError, match="tokens_mlp_dim: 32 there, 12 now"):
        trainer.train_and_evaluate(config, tmp_path / "run")


@pytest.mark.slow
def test_another_size_is_an_error_unless_asked_for(folder, tmp_path):
    config = config_from(folder, 16, "error")
    with pytest.raises(CheckpointError, match=r"--config\.resolution=") as error:
        trainer.train_and_evaluate(config, tmp_path)
    assert "tokens_mlp_dim=32" in str(error.value)


@pytest.mark.parametrize(
    ("crop", "overrides", "units"),
    [
        (16, {}, 32),
        ((8, 16), {}, 16),
        ((24, 8), {}, 24),
        ((8, 12), {}, 8),  # no whole multiple: the loader refuses it
        (24, {}, 72),
        (16, {"model.tokens_mlp_dim": 32}, 32),  # as it should be
        (16, {"model.tokens_mlp_dim": 9}, 9),  # the loader refuses it
        (16, {"model.patches.size": (8, 8)}, 8),  # larger patches, as many tokens
        (8, {"model.patches.size": (2, 2)}, 32),
        (8, {}, 8),
        (12, {}, 8),  # no whole multiple: the loader refuses it
        (16, {"pretrained_dir": ""}, 8),
        (16, {"resolution": "interpolate"}, 8),
    ],
)
def test_token_units(folder, tmp_path, crop, overrides, units):
    config = config_from(folder, crop, "block_diagonal")
    config.update_from_flattened_dict(overrides)
    before = config.model.tokens_mlp_dim
    found, note = set_token_units(config, tmp_path)
    assert found.model.tokens_mlp_dim == units
    assert bool(note) == (units != before)


@pytest.mark.parametrize("resolution", ["block_diagonal", "interpolate"])
def test_a_model_at_another_size(loaded, tmp_path, resolution):
    npz.save_checkpoint(tmp_path / "a.npz", loaded.params)
    found = load_model(tmp_path / "a.npz", image_size=32, resolution=resolution)
    assert found.transform == EvalTransform(32, resize=512)
    units = {"block_diagonal": 24, "interpolate": 6}[resolution]
    assert found.model == loaded.model.clone(tokens_mlp_dim=units)
    shapes = layout.shapes_of_model(found.model, (32, 32, 3))
    assert layout.shapes_of(found.params) == shapes
    images = np.random.default_rng(0).uniform(-1, 1, (2, 16, 16, 3)).astype("float32")
    if resolution == "block_diagonal":  # four times the same tile
        tiled = np.tile(images, (1, 2, 2, 1))
        logits, new = (
            jax.jit(functools.partial(x.model.apply, train=False))(
                {"params": x.params}, inputs
            )
            for x, inputs in ((loaded, images), (found, tiled))
        )
        np.testing.assert_allclose(new, logits, rtol=1e-4, atol=1e-4)
    same = load_model(tmp_path / "a.npz", image_size=16, resolution=resolution)
    assert (same.model, same.transform) == (loaded.model, loaded.transform)


def test_sizes_that_a_model_cannot_take(loaded, tmp_path, monkeypatch):
    npz.save_checkpoint(tmp_path / "a.npz", loaded.params)
    for size, resolution, message in (
        (18, "interpolate", "18x18 pixels cannot be cut into patches"),
        (8, "block_diagonal", "no block_diagonal from 4x4 patches to 2x2"),
        (0, "interpolate", r"no images of \(0, 0\) pixels"),
    ):
        with pytest.raises(CheckpointError, match=rf"a\.npz: .*{message}"):
            load_model(tmp_path / "a.npz", image_size=size, resolution=resolution)
    transform = dataclasses.replace(loaded.transform, permute=lambda image: image)
    permuted = dataclasses.replace(loaded, transform=transform)
    monkeypatch.setattr(loading, "_load_workdir", lambda path: permuted)
    with pytest.raises(CheckpointError, match=r"permuted the pixels .*pp\.permute"):
        load_model(tmp_path, image_size=32)
