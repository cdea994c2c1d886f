"""Whole runs of a shrunken configs/digits.py."""

import contextlib
import json
import os
import pathlib
import signal
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import common, digits
from mixer_jax.data import pipeline
from mixer_jax.run import evaluators, trainer
from mixer_jax.training.checkpointing import saved_steps
from mixer_jax.weights.npz import read_checkpoint


def tiny_config(**overrides):
    """A run of twelve steps that takes seconds."""
    config = digits.get_config()
    config.update_from_flattened_dict(
        {
            "pp.crop": 8,
            "model.patches.size": (4, 4),
            "model.num_blocks": 2,
            "model.hidden_dim": 16,
            "model.tokens_mlp_dim": 8,
            "model.channels_mlp_dim": 16,
            "model.stoch_depth": 0.1,  # so that the step's key matters
            "total_steps": 12,
            "batch": 16,
            "batch_eval": 64,
            "warmup_steps": 2,
            "eval_every": 6,
            "checkpoint_every": 3,
            "progress_every": 1,
        }
        | overrides
    )
    return config


def rows(workdir: pathlib.Path) -> list[dict]:
    text = (workdir / "metrics.jsonl").read_text()
    return [json.loads(row) for row in text.splitlines()]


def final_params(workdir: pathlib.Path):
    return read_checkpoint(workdir / "final.npz")


def assert_bit_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


class Killed(BaseException):
    """What nothing in a run catches."""


@contextlib.contextmanager
def killed_at(step):
    """Makes a run die without warning when it asks for the batch of `step`."""
    original = pipeline.train_batches

    class Batches:
        def __init__(self, *args, start_step=0, **kwargs):
            self.inner = original(*args, start_step=start_step, **kwargs)
            self.step = start_step

        def __next__(self):
            if self.step == step:
                raise Killed
            self.step += 1
            return next(self.inner)

        def close(self):
            self.inner.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "train_batches", Batches)
        with pytest.raises(Killed):
            yield


def test_run_leaves_what_a_user_needs(tmp_path):
    results = trainer.train_and_evaluate(tiny_config(), tmp_path)
    assert results["count"] == 364
    found = rows(tmp_path)
    train = [row for row in found if "train/loss" in row]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert all(row["train/images_per_sec"] > 0 for row in train)
    test = [row for row in found if "test/top1" in row]
    assert [row["step"] for row in test] == [6, 12]
    assert test[-1]["test/top1"] == results["top1"]
    assert test[-1]["test/count"] == 364
    assert 0 < results["top1"] <= results["top5"] <= 1
    assert json.loads((tmp_path / "class_names.json").read_text()) == list("0123456789")
    assert json.loads((tmp_path / "config.json").read_text())["batch"] == 16
    assert "test: top-1" in (tmp_path / "train.log").read_text()
    assert any((tmp_path / "tensorboard").iterdir())
    checkpoints = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert checkpoints == [6, 9, 12]  # the newest keep_checkpoints
    assert final_params(tmp_path)["head"]["kernel"].shape == (16, 10)


@pytest.mark.parametrize("step", [6, 8])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, step):
    config = tiny_config()
    expected = trainer.train_and_evaluate(config, tmp_path / "whole")
    with killed_at(step):
        trainer.train_and_evaluate(config, tmp_path / "killed")
    assert not (tmp_path / "killed" / "final.npz").exists()
    results = trainer.train_and_evaluate(config, tmp_path / "killed")
    assert results == expected
    assert_bit_equal(
        final_params(tmp_path / "killed"), final_params(tmp_path / "whole")
    )
    seen = [(row["step"], row.get("train/loss")) for row in rows(tmp_path / "killed")]
    assert seen == [
        (row["step"], row.get("train/loss")) for row in rows(tmp_path / "whole")
    ]
    assert names_by_row(tmp_path / "killed") == names_by_row(tmp_path / "whole")


@pytest.mark.parametrize(("step", "every"), [(6, 4), (8, 5), (11, 2)])
def test_a_rows_loss_is_the_mean_since_the_last_row_over_stops_too(
    tmp_path, step, every
):
    config = tiny_config()
    trainer.train_and_evaluate(config, tmp_path / "each")
    losses = [row["train/loss"] for row in rows(tmp_path / "each") if len(row) > 5]
    assert len(losses) == 12
    rare = tiny_config(progress_every=every)
    with killed_at(step):
        trainer.train_and_evaluate(rare, tmp_path / "killed")
    trainer.train_and_evaluate(rare, tmp_path / "killed")
    found = {
        row["step"]: row["train/loss"]
        for row in rows(tmp_path / "killed")
        if "train/loss" in row
    }
    assert found == {
        stop: sum(losses[stop - every : stop]) / every
        for stop in range(every, 13, every)
    }


def test_a_run_that_was_stopped_writes_the_rows_of_one_that_was_not(tmp_path):
    """Also from checkpoints of older runs, which keep no sums; then from there on."""
    config = tiny_config(progress_every=5, checkpoint_every=4)
    trainer.train_and_evaluate(config, tmp_path / "whole")
    with killed_at(9):
        trainer.train_and_evaluate(config, tmp_path / "older")
    (tmp_path / "older" / "checkpoints" / "8" / "manifest.json").unlink()
    path = tmp_path / "older" / "checkpoints" / "8" / "_CHECKPOINT_METADATA"
    metadata = json.loads(path.read_text())
    assert metadata["custom_metadata"]["steps"] == 3  # 6 to 8
    path.write_text(json.dumps(metadata | {"custom_metadata": {}}))
    trainer.train_and_evaluate(config, tmp_path / "older")
    losses = {}
    for name in ("whole", "older"):
        losses[name] = {
            row["step"]: row["train/loss"]
            for row in rows(tmp_path / name)
            if "train/loss" in row
        }
    assert losses["older"].keys() == losses["whole"].keys() == {5, 10}
    assert losses["older"][5] == losses["whole"][5]
    assert losses["older"][10] != losses["whole"][10]  # of the steps 9 and 10


def test_a_loss_that_is_not_finite_between_two_rows_stops_the_run(tmp_path):
    config = tiny_config(
        progress_every=100, base_lr=1e38, grad_norm_clip=0.0, warmup_steps=0
    )
    with pytest.raises(trainer.NonFiniteError, match=r"Step [2-9]: loss (nan|inf)"):
        trainer.train_and_evaluate(config, tmp_path)


def test_a_save_does_not_wait_for_evaluators(tmp_path, monkeypatch):
    """A run that ends while it evaluates loses nothing, and evaluates later."""
    config = tiny_config()
    expected = trainer.train_and_evaluate(config, tmp_path / "whole")
    with monkeypatch.context() as patch:
        patch.setattr(evaluators, "evaluate", raise_killed)
        with pytest.raises(Killed):
            trainer.train_and_evaluate(config, tmp_path / "killed")
    assert saved_steps(tmp_path / "killed") == [3, 6]
    assert rows(tmp_path / "killed")[-1].keys() >= {"train/loss"}
    assert trainer.train_and_evaluate(config, tmp_path / "killed") == expected
    assert_bit_equal(
        final_params(tmp_path / "killed"), final_params(tmp_path / "whole")
    )
    assert names_by_row(tmp_path / "killed") == names_by_row(tmp_path / "whole")


def raise_killed(*args):
    raise Killed


def names_by_row(workdir):
    return [(row["step"], row.keys()) for row in rows(workdir)]


def test_finished_run_is_evaluated_again_and_left_as_it_is(tmp_path, capsys):
    config = tiny_config()
    expected = trainer.train_and_evaluate(config, tmp_path)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    metrics = (tmp_path / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert trainer.train_and_evaluate(config, tmp_path) == expected
    assert "This run is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")} == files
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_stop_saves_and_does_not_evaluate(tmp_path, monkeypatch):
    calls = []
    stopping = contextlib.nullcontext(lambda step: calls.append(1) or len(calls) > 6)
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "stop_signals", lambda: stopping)
        patch.setattr(evaluators, "evaluate", raise_killed)
        with pytest.raises(trainer.RunStopped, match="Stopped at step 6 of 12"):
            trainer.train_and_evaluate(tiny_config(), tmp_path)
    assert saved_steps(tmp_path) == [3, 6]
    trainer.train_and_evaluate(tiny_config(), tmp_path)
    assert [row["step"] for row in rows(tmp_path) if "test/top1" in row] == [6, 12]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_and_stops_and_the_run_goes_on(tmp_path, number):
    config = tiny_config(total_steps=200, checkpoint_every=1000, eval_every=1000)
    metrics = tmp_path / "metrics.jsonl"
    done = threading.Event()

    def send_once_training():
        while not (metrics.exists() and metrics.read_text().count("\n") >= 2):
            if done.wait(0.001):
                return
        os.kill(os.getpid(), number)

    sender = threading.Thread(target=send_once_training)
    sender.start()
    try:
        with pytest.raises(trainer.RunStopped, match="same command continues"):
            trainer.train_and_evaluate(config, tmp_path)
    finally:
        done.set()
        sender.join()
    (checkpoint,) = (tmp_path / "checkpoints").iterdir()
    assert rows(tmp_path)[-1]["step"] == int(checkpoint.name) < 200
    trainer.train_and_evaluate(config, tmp_path)
    steps = [row["step"] for row in rows(tmp_path) if "train/loss" in row]
    assert steps == list(range(1, 201))


def test_stop_before_the_first_step(tmp_path, monkeypatch):
    stopping = contextlib.nullcontext(lambda step: True)
    monkeypatch.setattr(trainer, "stop_signals", lambda: stopping)
    with pytest.raises(trainer.RunStopped, match="before the first step"):
        trainer.train_and_evaluate(tiny_config(), tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_another_config_is_refused_and_changes_nothing(tmp_path):
    trainer.train_and_evaluate(tiny_config(total_steps=3), tmp_path)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    with pytest.raises(trainer.ConfigError) as error:
        trainer.train_and_evaluate(
            tiny_config(total_steps=3, base_lr=0.5, **{"pp.flip": True}), tmp_path
        )
    message = str(error.value)
    assert "base_lr: 0.003 there, 0.5 now" in message
    assert "pp.flip: False there, True now" in message
    assert "total_steps" not in message
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_infinite_loss_stops_the_run(tmp_path):
    config = tiny_config(
        optimizer="sgd", base_lr=1e30, grad_norm_clip=None, checkpoint_every=1
    )
    with pytest.raises(trainer.NonFiniteError, match=r"Step \d+: loss .*nan") as error:
        trainer.train_and_evaluate(config, tmp_path)
    saved = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
    assert f"checkpoints/{saved[-1]}" in str(error.value)
    assert not (tmp_path / "final.npz").exists()


def test_a_bucket_is_no_workdir():
    with pytest.raises(trainer.ConfigError, match=r"is gs://bucket/run, a URL"):
        trainer.train_and_evaluate(tiny_config(), "gs://bucket/run")


def test_an_error_of_the_run_is_raised_though_its_last_save_fails_too(
    tmp_path, monkeypatch, capsys
):
    config = tiny_config(
        optimizer="sgd", base_lr=1e30, grad_norm_clip=None, checkpoint_every=1
    )
    closed = []
    close = ocp.CheckpointManager.close
    monkeypatch.setattr(
        ocp.CheckpointManager, "close", lambda self: close(self) or closed.append(1)
    )

    def finalize(self, step):
        raise OSError(28, "No space left on device")

    def fail_from_now_on(*args):
        monkeypatch.setattr(ocp.CheckpointManager, "_finalize_checkpoint", finalize)
        return {"loss": float("nan")}

    monkeypatch.setattr(evaluators, "evaluate", fail_from_now_on)
    config.eval_every = 1
    with pytest.raises(trainer.NonFiniteError):
        trainer.train_and_evaluate(config, tmp_path)
    assert closed
    log = (tmp_path / "train.log").read_text()
    for text in (capsys.readouterr().out, log):
        assert "could not be saved either: OSError: [Errno 28] No space left" in text
    assert "NonFiniteError: Step 1: the loss on test is nan" in log


def test_workdir_of_a_failed_start_can_be_used_again(tmp_path):
    from mixer_jax.data.dataset import DatasetError

    with pytest.raises(DatasetError):
        trainer.train_and_evaluate(tiny_config(dataset="/no/folder"), tmp_path)
    trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)


def test_pretrained_parameters_but_for_the_head(tmp_path):
    trainer.train_and_evaluate(tiny_config(total_steps=4), tmp_path / "source")
    folder = tmp_path / "files"
    folder.mkdir()
    (tmp_path / "source" / "final.npz").rename(folder / "digits.npz")
    config = tiny_config(
        total_steps=1, base_lr=0.0, weight_decay=0.0, pretrained_dir=str(folder)
    )
    trainer.train_and_evaluate(config, tmp_path / "tuned")
    tuned, file = (
        final_params(tmp_path / "tuned"),
        read_checkpoint(folder / "digits.npz"),
    )
    head = tuned.pop("head")
    assert file.pop("head")["kernel"].any()
    assert not head["kernel"].any()  # as initialised
    assert_bit_equal(tuned, file)


@pytest.mark.slow
def test_float32_transfer_trains_about_the_same(tmp_path):
    uint8 = trainer.train_and_evaluate(tiny_config(), tmp_path / "uint8")
    exact = trainer.train_and_evaluate(
        tiny_config(**{"pp.transfer": "float32"}), tmp_path / "float32"
    )
    assert abs(uint8["loss"] - exact["loss"]) < 0.05
    assert uint8["loss"] != exact["loss"]


def test_durations_in_epochs_and_examples(tmp_path):
    config = tiny_config(
        total_steps=0, total_epochs=0.1, warmup_steps=0, warmup_examples=48
    )
    results = trainer.train_and_evaluate(config, tmp_path)
    train = [row for row in rows(tmp_path) if "train/loss" in row]
    assert train[-1]["step"] == 9
    np.testing.assert_allclose(train[-1]["train/epoch"], 9 * 16 / 1433)
    assert results["count"] == 364
    assert trainer.train_and_evaluate(config, tmp_path) == results  # the same config


def test_evaluators_have_their_own_split_labels_and_cadence(tmp_path, tfds_dir):
    config = tiny_config(
        dataset="tiny_shapes", tfds_data_dir=tfds_dir, eval_every=6, batch_eval=16
    )
    common.add_evaluator(config, "minival", split="train[30:]", every=4)
    common.add_evaluator(config, "real", label_key="real_label")
    common.add_evaluator(
        config, "probe", type="fewshot", dataset="digits", shots=(1, 5), every=12
    )
    trainer.train_and_evaluate(config, tmp_path)
    seen = {}
    for row in rows(tmp_path):
        for key, value in row.items():
            if key.endswith(("/count", "/1shot", "/5shot")):
                seen.setdefault(key, {})[row["step"]] = value
    assert seen["test/count"] == {6: 14, 12: 14}
    assert seen["minival/count"] == {4: 10, 8: 10, 12: 10}
    assert seen["real/count"] == {6: 9, 12: 9}  # 5 of 14 have no label
    assert seen["probe/1shot"].keys() == {12}
    assert 0 < seen["probe/1shot"][12] < seen["probe/5shot"][12] <= 1


def test_evaluator_of_other_classes(tmp_path, tfds_dir):
    config = tiny_config(tfds_data_dir=tfds_dir)
    common.add_evaluator(config, "other", dataset="tiny_shapes")
    with pytest.raises(trainer.ConfigError, match="has 2 classes, and the run 10"):
        trainer.train_and_evaluate(config, tmp_path)


def test_linear_probe_trains_the_head_alone_and_resumes(tmp_path):
    config = tiny_config(lr_multipliers=(("head/.*", 1.0), (".*", 0.0)))
    trainer.train_and_evaluate(config, tmp_path / "whole")
    with killed_at(7):
        trainer.train_and_evaluate(config, tmp_path / "killed")
    trainer.train_and_evaluate(config, tmp_path / "killed")
    final = final_params(tmp_path / "whole")
    assert_bit_equal(final_params(tmp_path / "killed"), final)
    trainer.train_and_evaluate(
        tiny_config(total_steps=1, base_lr=0.0), tmp_path / "start"
    )
    start = final_params(tmp_path / "start")
    assert abs(final.pop("head")["kernel"] - start.pop("head")["kernel"]).max() > 0
    assert_bit_equal(final, start)


def test_what_the_result_does_not_depend_on_may_change(tmp_path):
    expected = trainer.train_and_evaluate(tiny_config(), tmp_path / "whole")
    with killed_at(7):
        trainer.train_and_evaluate(tiny_config(), tmp_path / "killed")
    changed = tiny_config(
        keep_checkpoints=1,
        prefetch=1,
        progress_every=2,
        profile_steps=1,
        **{"mesh.fsdp": 2},
    )
    results = trainer.train_and_evaluate(changed, tmp_path / "killed")
    assert results["loss"] == pytest.approx(expected["loss"], abs=1e-4)


def test_evaluation_of_an_image_with_several_labels_is_as_before(tmp_path, tfds_dir):
    """In a run that trains on one label, any of several is right (ReaL)."""
    config = tiny_config(dataset="tiny_shapes", tfds_data_dir=tfds_dir, batch_eval=16)
    common.add_evaluator(config, "real", label_key="real_label")
    trainer.train_and_evaluate(config, tmp_path)
    found = [row for row in rows(tmp_path) if "real/count" in row]
    assert found[-1].keys() == {"step", "real/top1", "real/loss", "real/count"}
