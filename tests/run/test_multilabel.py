"""Runs on images with several labels, and what is done with them afterwards."""

import json
import sys

import jax
import numpy as np
import pytest
from sklearn.metrics import average_precision_score

from configs import common
from mixer_jax import cli
from mixer_jax.data.dataset import DatasetError, open_dataset
from mixer_jax.run import trainer
from mixer_jax.run.loading import load_model
from mixer_jax.training import sharding

from .test_trainer import assert_bit_equal, final_params, killed_at, rows, tiny_config

CLASSES = ["blue", "green", "red"]


@pytest.fixture(scope="module")
def table(tmp_path_factory, write_image):
    """Noise in which each colour is bright or not; some images are of no class."""
    root = tmp_path_factory.mktemp("colours")
    rng = np.random.default_rng(0)
    lines = ["path,label,split"]
    for i in range(90):
        is_bright = rng.random(3) < 0.4
        image = rng.integers(0, 160, (10, 10, 3)) + 95 * is_bright[::-1]
        write_image(root / "images" / f"{i}.png", image.astype(np.uint8))
        labels = "|".join(np.array(CLASSES)[is_bright])
        lines.append(f"images/{i}.png,{labels},{'train' if i < 60 else 'test'}")
    (root / "t.csv").write_text("\n".join(lines) + "\n")
    return str(root / "t.csv")


def config_of(table, **values):
    config = tiny_config(
        dataset=table,
        loss="sigmoid",
        batch_eval=16,
        total_steps=40,
        eval_every=40,
        checkpoint_every=20,
        base_lr=0.02,
        **values,
    )
    common.add_evaluator(
        config, "probe", type="fewshot", dataset="digits", shots=(1,), every=40
    )
    return config


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    result = trainer.train_and_evaluate(config_of(table), workdir)
    return workdir, result


@pytest.fixture
def mixer_jax(monkeypatch, capsys):
    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mixer-jax", *map(str, args)])
        capsys.readouterr()
        cli.main()
        return capsys.readouterr().out

    return run


def test_it_learns_and_says_so(run):
    workdir, result = run
    assert result.keys() == {"mAP", "top1", "loss", "count"}
    assert result["count"] == 30  # those of no class too
    assert result["mAP"] > 0.9
    (row,) = (row for row in rows(workdir) if "test/mAP" in row)
    assert row["test/mAP"] == result["mAP"]
    log = (workdir / "train.log").read_text()
    assert "3 classes, several labels an image" in log
    assert f"step 40  test: mAP {result['mAP']:.2%}, top-1 " in log
    assert "probe: 1-shot" in log


def test_the_number_is_that_of_the_logits(run, table):
    workdir, result = run
    loaded = load_model(workdir)
    assert loaded.multilabel
    source = open_dataset(table).split("test")
    images = np.stack([loaded.transform(x.pixels()) for x in source])
    images = (images.astype(np.float32) - 127.5) / 127.5
    logits = loaded.model.apply({"params": loaded.params}, images, train=False)
    labels = np.array([np.isin(range(3), x.label) for x in source])
    precisions = [average_precision_score(labels[:, i], logits[:, i]) for i in range(3)]
    assert result["mAP"] == pytest.approx(np.mean(precisions), abs=1e-6)


@pytest.mark.parametrize(("devices", "fsdp"), [(1, 1), (4, 2)])
def test_the_number_of_devices_does_not_matter(
    run, table, tmp_path, devices, fsdp, monkeypatch
):
    create_mesh = sharding.create_mesh
    monkeypatch.setattr(
        sharding, "create_mesh", lambda fsdp: create_mesh(fsdp, jax.devices()[:devices])
    )
    config = config_of(table, **{"mesh.fsdp": fsdp})
    found = trainer.train_and_evaluate(config, tmp_path)
    assert found == pytest.approx(run[1], abs=1e-4)


def test_killed_and_resumed_equals_uninterrupted(run, table, tmp_path):
    workdir, expected = run
    with killed_at(25):
        trainer.train_and_evaluate(config_of(table), tmp_path)
    assert trainer.train_and_evaluate(config_of(table), tmp_path) == expected
    assert_bit_equal(final_params(tmp_path), final_params(workdir))


def test_all_that_makes_soft_labels_of_them(table, tmp_path):
    config = config_of(table, label_smoothing=0.1, mixup_p=0.2, accum_steps=2)
    assert trainer.train_and_evaluate(config, tmp_path)["mAP"] > 0.9


def test_an_evaluator_of_the_head(table, tmp_path):
    config = config_of(table)
    common.add_evaluator(config, "train_part", split="train[:50%]")
    trainer.train_and_evaluate(config, tmp_path)
    (row,) = (row for row in rows(tmp_path) if "train_part/mAP" in row)
    assert row["train_part/count"] == 30


def test_few_shots_of_several_labels_are_refused(table, tmp_path):
    config = config_of(table)
    common.add_evaluator(config, "own", type="fewshot")
    with pytest.raises(
        DatasetError, match=r"config\.evals\.own\.train_split: .*one la"
    ):
        trainer.train_and_evaluate(config, tmp_path)


def test_the_commands(run, table, mixer_jax, tmp_path):
    workdir, result = run
    output = mixer_jax("evaluate", workdir, "--json-file", tmp_path / "e.json")
    assert f"mAP        {result['mAP']:.2%}\n" in output
    assert "class  average precision  images\n" in output
    report = json.loads((tmp_path / "e.json").read_text())
    assert {k: report[k] for k in result} == pytest.approx(result)
    classes = [x["average_precision"] for x in report["classes"]]
    assert np.mean(classes) == pytest.approx(result["mAP"])
    with pytest.raises(SystemExit, match="No confusion matrix where images have sev"):
        mixer_jax("evaluate", workdir, "--confusion-matrix", tmp_path / "c.png")

    image = open_dataset(table).split("test")[0]
    output = mixer_jax("predict", workdir, image.name, "--format", "json")
    (prediction,) = json.loads(output)
    found = {
        n
        for n, p in zip(prediction["names"], prediction["probabilities"], strict=True)
        if p > 0.5
    }
    assert len(prediction["names"]) == 3
    assert found == {CLASSES[i] for i in image.label}

    mixer_jax("plot", "runs", workdir, "--output", tmp_path / "p.png")
    assert (tmp_path / "p.png").stat().st_size > 10_000
    mixer_jax("export", workdir, tmp_path / "m.stablehlo")
    about = json.loads((tmp_path / "m.stablehlo.json").read_text())
    assert about["class_names"] == CLASSES
