"""What is wrong with the data of a run shows before the run begins."""

import shutil
from unittest import mock

import pytest

from configs import common
from mixer_jax.data import pipeline, workers
from mixer_jax.data.dataset import DatasetError
from mixer_jax.run import evaluators, trainer
from mixer_jax.run.data import open_data, open_evals
from mixer_jax.training.sharding import create_mesh

from ..examples import touch_folder, write_folder
from .test_trainer import tiny_config


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    classes = {"train/bee": 6, "train/cow": 6, "test/bee": 2, "test/cow": 2}
    root = write_folder(tmp_path_factory.mktemp("data") / "photos", classes)
    touch_folder(root, {"broken/bee": 2, "broken/cow": 2})
    return root


def config_of(photos, **spec):
    config = tiny_config(dataset=str(photos), total_steps=2)
    common.add_evaluator(config, "more", **spec)
    return config


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"split": "broken"},
            r"config\.evals\.more\.split: .*none of 4 images can be read",
        ),
        (
            {"split": "tset"},
            r"config\.evals\.more\.split: .*has no split 'tset'; it has 'broken', 'tes",
        ),
        (
            {"dataset": "/no/where"},
            r"config\.evals\.more\.dataset: There is no folder .*'/no/where'",
        ),
        (
            {"type": "fewshot", "train_split": "broken"},
            r"config\.evals\.more\.train_split: .*none of 4 images can be read",
        ),
    ],
)
def test_an_evaluator_that_cannot_work_is_named_before_the_first_step(
    photos, tmp_path, spec, message
):
    with pytest.raises(DatasetError, match=message):
        trainer.train_and_evaluate(config_of(photos, **spec), tmp_path)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_an_evaluator_whose_classes_are_called_otherwise(photos, tmp_path, caplog):
    write_folder(tmp_path / "other", {"train/bee": 1, "train/ox": 1})
    spec = {"dataset": str(tmp_path / "other"), "split": "train"}
    open_evals(open_data(config_of(photos, **spec)))
    assert "config.evals.more.dataset calls 1 classes otherwise" in caplog.text
    assert "'ox' for 'cow'; labels are compared by their numbers" in caplog.text


def test_the_fingerprint_has_the_evaluators_too(photos):
    data = open_evals(open_data(config_of(photos, split="train[:50%]")))
    assert list(data.fingerprint["splits"]) == [
        "train",
        "test",
        "config.evals.more.split",
    ]


def test_a_dataset_is_opened_once_and_warns_once(photos, tmp_path, caplog):
    for name in ("photos", "other"):
        shutil.copytree(photos, tmp_path / name)
        (tmp_path / name / "train/loose.png").touch()
    config = config_of(tmp_path / "photos")
    common.add_evaluator(config, "same", split="train[:50%]")
    for name in ("probe", "again"):
        spec = {"type": "fewshot", "shots": (1,), "dataset": str(tmp_path / "other")}
        common.add_evaluator(config, name, **spec)
    data = open_evals(open_data(config))
    for name in ("photos", "other"):
        warning = f"{tmp_path / name}/train: left out 1 images"
        assert caplog.text.count(warning) == 1
    # The fingerprint is as if each had been opened and read by itself.
    splits = data.fingerprint["splits"]
    assert splits["config.evals.more.split"] == splits["test"]
    assert splits["config.evals.same.split"] != splits["train"]
    for part in ("split", "train_split"):
        digests = splits[f"config.evals.probe.{part}"]
        assert digests == splits[f"config.evals.again.{part}"]
    assert digests == splits["train"]


def test_several_labels_need_a_loss_that_takes_them(tfds_dir):
    config = tiny_config(
        dataset="tiny_shapes", tfds_data_dir=tfds_dir, label_key="real_label"
    )
    message = r"have several labels, but loss is softmax, .* --config\.loss=sigmoid"
    with pytest.raises(DatasetError, match=message):
        open_data(config)
    config.loss = "sigmoid"
    assert open_data(config).multilabel
    # The evaluator of the same dataset reads the same labels, unless it says otherwise.
    common.add_evaluator(config, "more")
    common.add_evaluator(config, "one", label_key="label")
    found = open_evals(open_data(config)).evals
    kinds = {name: type(x.source[0].label) for name, x in found.items()}
    assert kinds == {"more": tuple, "one": int}


def test_a_name_with_a_separator_can_stay_one_class(photos, tmp_path):
    files = sorted(photos.glob("train/*/*"))
    table = tmp_path / "table.csv"
    rows = [f"{x},{'a|b' if 'bee' in x.parts else 'c'}" for x in files]
    table.write_text("\n".join(["path,label", *rows]))
    config = tiny_config(dataset=str(table))
    config.pp.train, config.pp.test = "train[:75%]", "train[75%:]"
    message = (
        r"--config\.loss=sigmoid\. If a \| .* part of a name.* classes\.txt beside"
    )
    with pytest.raises(DatasetError, match=message):
        open_data(config)
    (tmp_path / "classes.txt").write_text("a|b\nc\n")
    data = open_data(config)
    assert data.class_names == ["a|b", "c"]
    assert not data.multilabel


def test_label_key_that_is_not_there(tfds_dir):
    config = tiny_config(
        dataset="tiny_shapes", tfds_data_dir=tfds_dir, label_key="labels"
    )
    with pytest.raises(DatasetError, match="no image with a class labels"):
        open_data(config)


def test_workers_are_those_of_the_config_or_suit_images_and_machine(
    photos, monkeypatch
):
    """A training run and an evaluation ask for them; a small evaluation never does."""

    class Asked(Exception):  # noqa: N818
        pass

    def batches(*args, workers, **kwargs):
        raise Asked(workers)

    def asked(config, least):
        monkeypatch.setattr(workers, "MIN_IMAGES", least)
        monkeypatch.setattr(evaluators, "MIN_IMAGES", least)
        data, mesh, found = open_data(config), create_mesh(), []
        (test,) = evaluators.open_evaluators(config, data, mock.Mock(), mesh)
        for call in lambda: data.train_batches(0, mesh), lambda: test.run(None):
            with pytest.raises(Asked) as caught:
                call()
            found.append(caught.value.args[0])
        return found

    monkeypatch.setattr(pipeline, "train_batches", batches)
    monkeypatch.setattr(pipeline, "eval_batches", batches)
    monkeypatch.setattr(workers, "num_cores", lambda: 24)
    of_files = tiny_config(dataset=str(photos), batch=8, total_steps=2)
    assert asked(of_files, 4) == [3, 3]
    assert asked(of_files, 16) == [3, 0]
    assert asked(of_files, 17) == [0, 0]
    assert asked(tiny_config(), 1) == [0, 0]  # digits are in memory
    of_files.workers = 5
    assert asked(of_files, 1) == [5, 5]
    assert asked(of_files, 17) == [5, 0]
