"""Runs on images that are no squares, or whose mean and deviation are not the usual."""

import importlib.util
import json

import jax
import numpy as np
import pytest

from configs import common
from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.preprocess import HALF, EvalTransform, scale
from mixer_jax.evaluation.classification import evaluate_dataset
from mixer_jax.run import data as run_data
from mixer_jax.run import trainer
from mixer_jax.run.loading import load_model
from mixer_jax.weights.export import export_onnx, export_stablehlo
from mixer_jax.weights.npz import save_checkpoint

from .test_trainer import assert_bit_equal, final_params, killed_at, rows, tiny_config

COLOR = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 1.0)}
CROP = (8, 12)
TRANSFORM = EvalTransform(
    CROP, "torchvision", (10, 15), interpolation="pil_bicubic", **COLOR
)


def rectangle_config(**overrides):
    config = tiny_config(
        **{
            "pp.crop": CROP,
            "pp.evaluation": "torchvision",
            "pp.resize": (10, 15),
            "pp.interpolation": "pil_bicubic",
            "pp.mean": COLOR["mean"],
            "pp.std": COLOR["std"],
            "pp.randaugment": (1, 5.0),
            "mixup_p": 0.5,
            "total_steps": 2,
            "warmup_steps": 0,
            "eval_every": 2,
            "checkpoint_every": 1,
        }
        | overrides
    )
    common.add_evaluator(
        config,
        "probe",
        type="fewshot",
        evaluation="resize_small_then_central_crop",
        resize=(12, 16),
        shots=(2,),
    )
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of such a run on eight devices, and its result."""
    workdir = tmp_path_factory.mktemp("images") / "run"
    return workdir, trainer.train_and_evaluate(rectangle_config(), workdir)


def test_a_rectangle_resumes_to_the_bit(run, tmp_path):
    workdir, expected = run
    with killed_at(1):
        trainer.train_and_evaluate(rectangle_config(), tmp_path)
    assert trainer.train_and_evaluate(rectangle_config(), tmp_path) == expected
    assert_bit_equal(final_params(tmp_path), final_params(workdir))
    assert rows(tmp_path)[-1].keys() == {"step", "probe/2shot"}
    assert "8 x 12 pixels" in (tmp_path / "train.log").read_text()


def test_a_rectangle_is_loaded_and_scored_as_in_its_run(run):
    workdir, expected = run
    loaded = load_model(workdir)
    assert loaded.transform == TRANSFORM
    report = evaluate_dataset(
        loaded.model, loaded.params, loaded.transform, open_dataset("digits"), "test"
    )
    for key, value in expected.items():
        np.testing.assert_allclose(report.metrics[key], value, atol=1e-5, err_msg=key)
    larger = load_model(workdir, image_size=(16, 24), resolution="block_diagonal")
    assert larger.model.tokens_mlp_dim == 4 * loaded.model.tokens_mlp_dim
    assert (larger.transform.crop, larger.transform.resize) == ((16, 24), (20, 30))
    assert load_model(workdir, image_size=CROP).params is not None


@pytest.mark.parametrize("ending", ["stablehlo", "onnx"])
def test_a_rectangle_is_exported(run, tmp_path, ending):
    if ending == "onnx" and importlib.util.find_spec("jax2onnx") is None:
        pytest.skip("the extra onnx is not installed")
    loaded, path = load_model(run[0]), tmp_path / f"a.{ending}"
    write = {"stablehlo": export_stablehlo, "onnx": export_onnx}[ending]
    write(path, loaded.model, loaded.params, loaded.transform)
    about = json.loads((tmp_path / f"a.{ending}.json").read_text())
    assert about["input"]["shape"] == ["n", *CROP, 3]
    assert about["preprocessing"].pop("steps").startswith("resize so that the image")
    assert EvalTransform(**about["preprocessing"]) == TRANSFORM

    images = np.random.default_rng(0).integers(0, 256, (5, *CROP, 3), np.uint8)
    if ending == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        [logits] = session.run(None, {"images": images})
    else:
        logits = jax.export.deserialize(bytearray(path.read_bytes())).call(images)
    inputs = (images / 255 - COLOR["mean"]) / COLOR["std"]
    want = loaded.model.apply({"params": loaded.params}, inputs, train=False)
    np.testing.assert_allclose(logits, want, atol=1e-5)


def test_the_same_images_scaled_here_or_there(tmp_path):
    """uint8 images are scaled on the device, float32 ones before."""

    def norms(name, **overrides):
        config = tiny_config(
            total_steps=2,
            eval_every=2,
            **{"pp.crop": (8, 16), "pp.interpolation": "area"},  # whole levels
            **{"pp.area_range": (1.0, 1.0), "pp.aspect_range": (1.0, 1.0)},
            **overrides,
        )
        trainer.train_and_evaluate(config, tmp_path / name)
        found = rows(tmp_path / name)
        return [row["train/grad_norm"] for row in found if "train/grad_norm" in row]

    color = {f"pp.{key}": value for key, value in COLOR.items()}
    here = norms("uint8", **color)
    there = norms("float32", **color, **{"pp.transfer": "float32"})
    np.testing.assert_allclose(here, there, rtol=1e-4)
    assert abs(norms("half")[0] / here[0] - 1) > 0.01


def test_none_is_half():
    data = run_data.open_data(tiny_config(**{"pp.mean": None, "pp.std": 1}))
    for transform in (data.train_transform, data.eval_transform):
        assert (transform.mean, transform.std) == (HALF, (1.0, 1.0, 1.0))


def test_a_run_of_before_these_keys_goes_on(run, tmp_path):
    """Its config.json has one number for the crop, and no mean."""
    config = tiny_config(total_steps=1, eval_every=1, checkpoint_every=1)
    expected = trainer.train_and_evaluate(config, tmp_path)
    path = tmp_path / "config.json"
    recorded = json.loads(path.read_text())
    assert recorded["pp"]["crop"] == 8
    for key in ("interpolation", "mean", "std"):
        assert recorded["pp"].pop(key) is None
    path.write_text(json.dumps(recorded))
    loaded = load_model(tmp_path)
    assert loaded.transform == EvalTransform(8, resize=recorded["pp"]["resize"])
    assert trainer.train_and_evaluate(config, tmp_path) == expected
    config.pp.std = 1.0
    with pytest.raises(trainer.ConfigError, match=r"pp\.std: None there, 1\.0 now"):
        trainer.train_and_evaluate(config, tmp_path)


def test_a_file_of_a_rectangle_needs_its_size(run, tmp_path):
    save_checkpoint(tmp_path / "a.npz", final_params(run[0]))
    with pytest.raises(ValueError, match=r"6 tokens of 4x4 .* no square .* 320x224"):
        load_model(tmp_path / "a.npz")
    with pytest.raises(
        ValueError, match=r"Images of 8x8 pixels have 4\. Give the size"
    ):
        load_model(tmp_path / "a.npz", image_size=8)
    with pytest.raises(ValueError, match=r"9x12 pixels cannot be cut into patches"):
        load_model(tmp_path / "a.npz", image_size=(9, 12))
    loaded = load_model(tmp_path / "a.npz", image_size=CROP)
    assert loaded.transform.crop == CROP
    images = np.random.default_rng(0).integers(0, 256, (2, *CROP, 3), np.uint8)
    logits = loaded.model.apply({"params": loaded.params}, scale(images), train=False)
    assert logits.shape == (2, 10)


def test_a_rectangle_starts_from_a_rectangle(run, tmp_path):
    config = rectangle_config(init_from=str(run[0]), total_steps=1, base_lr=0.0)
    trainer.train_and_evaluate(config, tmp_path / "run")
    assert_bit_equal(final_params(tmp_path / "run"), final_params(run[0]))
    config.pp.crop, config.pp.resize = (12, 8), (15, 10)
    with pytest.raises(
        trainer.ConfigError, match=r"pp\.crop: \(8, 12\) there, \(12, 8\) here"
    ):
        trainer.train_and_evaluate(config, tmp_path / "other")
