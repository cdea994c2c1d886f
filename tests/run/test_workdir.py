"""Which workdirs a run goes on in, and which it refuses."""

import json
import os
import shutil

import pytest

from configs import common
from mixer_jax.data.dataset import DatasetError
from mixer_jax.run import trainer
from mixer_jax.run import workdir as workdirs
from mixer_jax.run.loading import load_model, open_test_split
from mixer_jax.training.checkpointing import saved_steps

from ..examples import write_folder
from .test_trainer import (
    assert_bit_equal,
    final_params,
    killed_at,
    tiny_config,
    with_batches,
)


def test_a_workdir_that_is_not_in_utf8_is_refused(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(
        trainer.ConfigError, match=r"caf\\xe9: its name is not in UTF-8"
    ):
        workdirs.open_workdir(tiny_config(), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_what_a_save_left_that_was_cut_off_is_no_result(tmp_path):
    trainer.train_and_evaluate(tiny_config(total_steps=3), tmp_path)
    (tmp_path / "final.npz").unlink()
    (tmp_path / "checkpoints" / "3").rename(
        tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    )
    config = tiny_config(total_steps=3, base_lr=0.5)
    trainer.train_and_evaluate(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base_lr"] == 0.5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(tmp_path):
    """And nothing is changed; where it was killed before it saved, it does."""
    folder, config = tmp_path / "checkpoints", tiny_config(checkpoint_every=4)
    with killed_at(3):
        trainer.train_and_evaluate(config, tmp_path)
    with killed_at(11):
        trainer.train_and_evaluate(config, tmp_path)
    shutil.copytree(folder, tmp_path / "copy")
    files = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.*")}
    for emptied in (True, False):
        shutil.rmtree(folder)
        if emptied:  # as where a disk is not mounted
            folder.mkdir()
        with pytest.raises(trainer.ConfigError, match=r"metrics\.jsonl up to step 1\d"):
            trainer.train_and_evaluate(config, tmp_path)
        assert {p: p.stat().st_mtime_ns for p in tmp_path.glob("*.*")} == files
        assert folder.exists() == emptied
    (tmp_path / "copy").rename(folder)
    trainer.train_and_evaluate(config, tmp_path)
    folder.rename(tmp_path / "copy")
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(trainer.ConfigError, match=r"has final\.npz, and no checkpoint"):
        trainer.train_and_evaluate(config, tmp_path)


def test_a_whole_checkpoint_is_a_result(tmp_path):
    with killed_at(4):
        trainer.train_and_evaluate(tiny_config(), tmp_path)
    with pytest.raises(trainer.ConfigError, match=r"base_lr: 0.003 there, 0.5 now"):
        trainer.train_and_evaluate(tiny_config(base_lr=0.5), tmp_path)


def test_a_run_whose_lock_was_taken_over_saves_no_more(tmp_path):
    """As when its process was suspended, and another machine took it for dead."""

    def take(step, batches):
        if step == 5:
            (tmp_path / "run.lock").unlink()
            (tmp_path / "run.lock").write_text("another's")
        return next(batches)

    with (
        with_batches(take),
        pytest.raises(trainer.WorkdirInUseError, match="now in use by another proc"),
    ):
        trainer.train_and_evaluate(tiny_config(), tmp_path)
    assert saved_steps(tmp_path) == [3]
    assert (tmp_path / "run.lock").read_text() == "another's"


def remove_from_config(workdir, key):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    *path_to_key, last = key.split(".")
    node = config
    for part in path_to_key:
        node = node[part]
    del node[last]
    path.write_text(json.dumps(config))


def test_a_run_of_before_a_key_was_added_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(workdirs.ADDED_KEYS, "sam_rho", 0.0)
    for name in ("whole", "old"):
        with killed_at(7):
            trainer.train_and_evaluate(tiny_config(), tmp_path / name)
    for key in ("sam_rho", "profile_steps"):
        remove_from_config(tmp_path / "old", key)
    with pytest.raises(trainer.ConfigError, match=r"sam_rho: 0.0 there, 0.1 now"):
        trainer.train_and_evaluate(tiny_config(sam_rho=0.1), tmp_path / "old")
    trainer.train_and_evaluate(tiny_config(), tmp_path / "whole")
    trainer.train_and_evaluate(tiny_config(), tmp_path / "old")
    assert_bit_equal(final_params(tmp_path / "old"), final_params(tmp_path / "whole"))


def test_a_field_that_was_added_to_the_model_had_its_default(tmp_path):
    trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)
    remove_from_config(tmp_path, "model.gelu")
    trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)
    remove_from_config(tmp_path, "model.gelu")
    config = tiny_config(total_steps=1, **{"model.gelu": "erf"})
    with pytest.raises(trainer.ConfigError, match=r"model.gelu: tanh there, erf now"):
        trainer.train_and_evaluate(config, tmp_path)


def test_a_key_that_is_absent_without_a_default_is_named(tmp_path):
    trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)
    remove_from_config(tmp_path, "base_lr")
    with pytest.raises(trainer.ConfigError, match=r"base_lr: absent there, 0.003 now"):
        trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)


def test_config_of_a_run_without_a_result_can_be_mended(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no evaluators today")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "open_evaluators", fail)
        with pytest.raises(RuntimeError):
            trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)
    assert (tmp_path / "config.json").exists()
    trainer.train_and_evaluate(tiny_config(total_steps=1, base_lr=0.5), tmp_path)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A folder with photographs, and a run on them that was stopped at step 3."""
    root = tmp_path_factory.mktemp("stopped")
    classes = ("bee", "cow", "dog")
    folders = {f"train/{x}": 6 for x in classes} | {f"test/{x}": 2 for x in classes}
    write_folder(root / "photos", folders)
    with pytest.MonkeyPatch.context() as patch, killed_at(4):
        patch.chdir(root)
        trainer.train_and_evaluate(config_of("photos"), "run")
    return root


def config_of(dataset, **values):
    return tiny_config(dataset=str(dataset), batch_eval=16, total_steps=6, **values)


@pytest.fixture
def run(stopped, tmp_path, monkeypatch):
    """A copy of it, whose config.json has the paths of the copy; the current folder."""
    shutil.copytree(stopped, tmp_path / "copy")
    path = tmp_path / "copy" / "run" / "config.json"
    path.write_text(path.read_text().replace(str(stopped), str(tmp_path / "copy")))
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy" / "run"


def make_old(run):
    """Makes it a run of before fingerprints and absolute paths were kept."""
    (run / "dataset.json").unlink()
    config = json.loads((run / "config.json").read_text())
    config |= config.pop("as_typed")
    del config["init_from"], config["label_key"]
    (run / "config.json").write_text(json.dumps(config))


def test_an_older_run_is_not_continued_on_more_images(run):
    make_old(run)
    (run / "metrics.jsonl").write_text('{"step": 3, "train/epoch": 2.6666666667}\n')
    gain(run.parent / "photos")
    with pytest.raises(trainer.ConfigError, match="train: 18 images before, 19 now"):
        trainer.train_and_evaluate(config_of("photos"), run)


def test_paths_are_kept_absolute_and_as_typed(run):
    config = json.loads((run / "config.json").read_text())
    assert config["dataset"] == str(run.parent / "photos")
    assert config["as_typed"] == {"dataset": "photos"}


def gain(photos):
    shutil.copy(photos / "train/bee/000.jpg", photos / "train/bee/new.jpg")


def lose(photos):
    (photos / "test/bee/000.jpg").unlink()


def swap(photos):
    (photos / "train/bee").rename(photos / "train/x")
    (photos / "train/cow").rename(photos / "train/bee")
    (photos / "train/x").rename(photos / "train/cow")


def resize(photos):
    with (photos / "train/cow/001.PNG").open("ab") as file:
        file.write(b"x")


def rename_class(photos):
    for split in ("train", "test"):
        (photos / split / "bee").rename(photos / split / "wasp")


def rename_split(photos):
    (photos / "test").rename(photos / "val")


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (gain, "train: 18 images before, 19 now"),
        (lose, "test: 6 images before, 5 now"),
        (swap, "train: 18 images as before, with other sizes, contents"),
        (resize, "train: 18 images as before, with other sizes"),
        (rename_class, "classes: 3 classes as before, with other names"),
        (rename_split, "test: gone\n  val: new"),
    ],
)
def test_data_that_changed_are_refused_with_what_changed(run, change, line):
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*.json")}
    change(run.parent / "photos")
    config = config_of("photos")
    with pytest.raises(trainer.ConfigError, match="not what they were") as error:
        trainer.train_and_evaluate(config, run)
    assert f"\n  {line}" in str(error.value)
    assert "another --workdir" in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*.json")} == before
    # Elsewhere the changed data are as good as any.
    trainer.train_and_evaluate(config_of("photos", init_from=str(run)), "other")


def test_a_finished_run_is_not_evaluated_on_other_data(run):
    config = config_of("photos")
    trainer.train_and_evaluate(config, run)
    metrics = (run / "metrics.jsonl").read_text()
    lose(run.parent / "photos")
    with pytest.raises(trainer.ConfigError, match="test: 6 images before, 5 now"):
        trainer.train_and_evaluate(config, run)
    assert (run / "metrics.jsonl").read_text() == metrics
    assert (run / "final.npz").exists()


@pytest.mark.parametrize("spelling", ["absolute", "link", "moved"])
def test_a_dataset_that_is_spelled_otherwise_or_moved(run, capsys, spelling):
    root = run.parent
    expected = trainer.train_and_evaluate(
        config_of("photos"), shutil.copytree(run, "2")
    )
    dataset = {
        "absolute": lambda: root / "photos",
        "link": lambda: (root / "link").symlink_to("photos") or "link",
        "moved": lambda: shutil.move(root / "photos", root.parent / "elsewhere"),
    }[spelling]()
    capsys.readouterr()
    assert trainer.train_and_evaluate(config_of(dataset), run) == expected
    output = capsys.readouterr().out
    moved = f"dataset: {root}/photos then, {root.parent}/elsewhere now"
    assert (moved in output) == (spelling == "moved")
    assert_bit_equal(final_params(run), final_params(root / "2"))
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["dataset"] == str(root / dataset)


def test_another_dataset_is_refused_and_a_wrong_path_is_named(run):
    other = shutil.copytree(run.parent / "photos", run.parent / "other")
    gain(other)
    with pytest.raises(trainer.ConfigError) as error:
        trainer.train_and_evaluate(config_of("other"), run)
    error.match(f"dataset: {run.parent}/photos then, other now\n  train: 18 images")
    with pytest.raises(DatasetError, match=r"no folder or .*photoz'.* Did you mean"):
        trainer.train_and_evaluate(config_of("./photoz"), run)
    with pytest.raises(trainer.ConfigError, match=r"base_lr: 0\.003 there, 0\.5 now"):
        trainer.train_and_evaluate(config_of("./photoz", base_lr=0.5), run)


def test_a_run_of_before_fingerprints_continues_and_gets_one(run, monkeypatch):
    make_old(run)
    another = shutil.copytree(run, run.parent / "2")
    monkeypatch.chdir(run)
    with pytest.raises(DatasetError, match="photos"):  # not from another folder
        trainer.train_and_evaluate(config_of("photos"), run)
    monkeypatch.chdir(run.parent)
    trainer.train_and_evaluate(config_of("photos"), run)
    recorded = json.loads((run / "config.json").read_text())
    assert recorded["dataset"] == str(run.parent / "photos")
    before = json.loads((run / "dataset.json").read_text())["fingerprint"]
    assert before["splits"]["train"]["count"] == 18
    # Nothing shows that another folder holds the same.
    shutil.copytree("photos", "other")
    with pytest.raises(trainer.ConfigError, match="dataset: photos there, other now"):
        trainer.train_and_evaluate(config_of("other"), another)
    rename_class(run.parent / "photos")
    with pytest.raises(trainer.ConfigError, match=r"3 now; changed: bee, wasp\n"):
        trainer.train_and_evaluate(config_of("photos"), another)


def test_a_run_of_before_fingerprints_that_became_shorter(run):
    make_old(run)
    path = run / "config.json"
    epochs = {"total_steps": 0, "total_epochs": 3.0}  # of 18 images in batches of 16
    path.write_text(json.dumps(json.loads(path.read_text()) | epochs))
    for image in sorted((run.parent / "photos" / "train").glob("*/00[0-4]*")):
        image.unlink()
    config = config_of("photos")
    config.update(epochs)
    with pytest.raises(trainer.ConfigError, match="3 images make 1 steps, and step 3 "):
        trainer.train_and_evaluate(config, run)


def test_data_of_an_evaluator_count_too(run):
    def config(dataset="photos"):
        config = config_of("photos", eval_every=2)
        common.add_evaluator(config, "more", dataset=dataset, split="train[:50%]")
        return config

    with killed_at(4):
        trainer.train_and_evaluate(config(), "2")
    shutil.copytree("photos", "other")
    trainer.train_and_evaluate(config("other"), shutil.copytree("2", "3"))
    gain(run.parent / "other")
    with pytest.raises(trainer.ConfigError) as error:
        trainer.train_and_evaluate(config("other"), "2")
    error.match(r"config\.evals\.more\.split: 9 images before, 10 now")
    error.match(f"evals.more.dataset: {run.parent}/photos then, other now")


def test_evaluate_finds_the_dataset_and_warns_if_it_changed(run, monkeypatch, caplog):
    photos = run.parent / "photos"
    monkeypatch.chdir("/")
    loaded = load_model(run)
    dataset, split = open_test_split(loaded, None)
    assert (dataset.name, split, len(dataset.split(split))) == (str(photos), "test", 6)
    assert not caplog.text
    gain(photos)  # to train on: of no importance here
    open_test_split(loaded, None)
    open_test_split(loaded, str(photos), "train")
    assert caplog.text.count("has changed") == 1  # that was the other split
    caplog.clear()
    lose(photos)
    for name in (None, str(photos), f"{photos}/../photos"):
        open_test_split(loaded, name)
        assert f"{photos} has changed since the run: test: 6 images" in caplog.text
        caplog.clear()
    other = shutil.move(photos, run.parent / "other")
    open_test_split(loaded, str(other))
    assert not caplog.text
    with pytest.raises(
        DatasetError,
        match=r"If it moved, give --dataset\. There is no",
    ):
        open_test_split(loaded, None)
