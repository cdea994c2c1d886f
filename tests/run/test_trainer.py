"""Whole runs of a shrunken configs/digits.py."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import threading

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from configs import common, digits
from mixer_jax.data import pipeline
from mixer_jax.run import evaluators, trainer
from mixer_jax.training import stopping
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
            "mixup_p": 0.0,  # half of what the step's compilation would take
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
def with_batches(change):
    """Trains on what `change(step, batches)` returns for each step, from 1."""
    original = pipeline.train_batches

    class Batches:
        def __init__(self, *args, start_step=0, **kwargs):
            self.inner = original(*args, start_step=start_step, **kwargs)
            self.step = start_step

        def __next__(self):
            self.step += 1
            return change(self.step, self.inner)

        def close(self):
            self.inner.close()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "train_batches", Batches)
        yield


@contextlib.contextmanager
def killed_at(step):
    """Makes a run die without warning when it asks for the batch after `step`."""

    def change(next_step, batches):
        if next_step == step + 1:
            raise Killed
        return next(batches)

    with with_batches(change), pytest.raises(Killed):
        yield


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The workdir of a run that nothing disturbed, and its results; to be read only."""
    workdir = tmp_path_factory.mktemp("whole")
    return workdir, trainer.train_and_evaluate(tiny_config(), workdir)


def test_run_leaves_what_a_user_needs(whole):
    workdir, results = whole
    assert results["count"] == 364
    found = rows(workdir)
    train = [row for row in found if "train/loss" in row]
    assert [row["step"] for row in train] == list(range(1, 13))
    assert all(row["train/images_per_sec"] > 0 for row in train)
    test = [row for row in found if "test/top1" in row]
    assert [row["step"] for row in test] == [6, 12]
    assert test[-1]["test/top1"] == results["top1"]
    assert test[-1]["test/count"] == 364
    assert 0 < results["top1"] <= results["top5"] <= 1
    assert json.loads((workdir / "class_names.json").read_text()) == list("0123456789")
    assert json.loads((workdir / "config.json").read_text())["batch"] == 16
    log = (workdir / "train.log").read_text()
    assert "1,433 images to train on" in log
    assert "test: top-1" in log
    assert any((workdir / "tensorboard").iterdir())
    checkpoints = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert checkpoints == [6, 9, 12]  # the newest keep_checkpoints
    assert final_params(workdir)["head"]["kernel"].shape == (16, 10)


@pytest.mark.parametrize("step", [6, 8])
def test_killed_and_resumed_equals_uninterrupted(tmp_path, step, built_anew):
    """Also with a program that is built anew, as in another process."""
    config = tiny_config(mixup_p=0.2)
    expected = trainer.train_and_evaluate(config, tmp_path / "whole")
    with killed_at(step):
        trainer.train_and_evaluate(config, tmp_path / "killed")
    assert not (tmp_path / "killed" / "final.npz").exists()
    built_anew()
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
    tmp_path, whole, step, every
):
    losses = [row["train/loss"] for row in rows(whole[0]) if len(row) > 5]
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
    log = (tmp_path / "killed" / "train.log").read_text()
    assert f"step {every:2}/12  loss {found[every]:.4f}" in log


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


def damaged_at(*steps):
    def change(step, batches):
        batch = next(batches)
        if step in steps:
            batch["image"] = batch["image"].copy()
            batch["image"][3] = np.nan
        return batch

    return with_batches(change)


def skipping_config(**overrides):
    exact = {"pp.transfer": "float32", "model.stoch_depth": 0.0}
    return tiny_config(
        on_nonfinite="skip",
        decay_type="constant",
        progress_every=2,
        **exact,
        **overrides,
    )


def test_a_skipped_batch_leaves_the_run_as_if_it_had_not_been_there(tmp_path):
    with damaged_at(5):
        trainer.train_and_evaluate(skipping_config(), tmp_path / "whole")
    assert "step 5  loss nan" in (tmp_path / "whole" / "train.log").read_text()
    with damaged_at(5), killed_at(8):  # it counts on
        trainer.train_and_evaluate(skipping_config(), tmp_path / "killed")
    trainer.train_and_evaluate(skipping_config(), tmp_path / "killed")

    def without_the_fifth(step, batches):
        if step == 5:
            next(batches)
        return next(batches)

    with with_batches(without_the_fifth):
        trainer.train_and_evaluate(
            skipping_config(total_steps=11, checkpoint_every=11), tmp_path / "without"
        )
    for name in ("killed", "without"):
        assert_bit_equal(
            final_params(tmp_path / name), final_params(tmp_path / "whole")
        )
    train = [
        [row for row in rows(tmp_path / name) if "train/loss" in row]
        for name in ("whole", "killed")
    ]
    assert [row["train/skipped"] for row in train[0]] == [0, 0, 1, 1, 1, 1]
    for key in ("step", "train/loss", "train/skipped"):
        assert [row[key] for row in train[0]] == [row[key] for row in train[1]]


def test_a_run_stops_when_too_many_batches_in_a_row_are_bad(tmp_path):
    config = skipping_config(nonfinite_limit=3, checkpoint_every=1)
    match = r"Step 8: loss nan, .* the updates of 3 steps in a row were skipped"
    with (
        damaged_at(2, 3, 6, 7, 8),
        pytest.raises(trainer.NonFiniteError, match=match),
    ):
        trainer.train_and_evaluate(config, tmp_path)
    last = [row for row in rows(tmp_path) if "train/loss" in row][-1]
    assert (last["step"], last["train/skipped"]) == (6, 3)
    # The count goes on where the run does. Other values of these keys are allowed.
    with damaged_at(8), pytest.raises(trainer.NonFiniteError, match=match):
        trainer.train_and_evaluate(config, tmp_path)
    config.nonfinite_limit = 4
    trainer.train_and_evaluate(config, tmp_path)


def test_a_save_does_not_wait_for_evaluators(tmp_path, whole, monkeypatch):
    """A run that ends while it evaluates loses nothing, and evaluates later."""
    config = tiny_config()
    workdir, expected = whole
    with monkeypatch.context() as patch:
        patch.setattr(evaluators, "evaluate", raise_killed)
        with pytest.raises(Killed):
            trainer.train_and_evaluate(config, tmp_path / "killed")
    assert saved_steps(tmp_path / "killed") == [3, 6]
    assert rows(tmp_path / "killed")[-1].keys() >= {"train/loss"}
    assert trainer.train_and_evaluate(config, tmp_path / "killed") == expected
    assert_bit_equal(final_params(tmp_path / "killed"), final_params(workdir))
    assert names_by_row(tmp_path / "killed") == names_by_row(workdir)


def raise_killed(*args):
    raise Killed


def names_by_row(workdir):
    return [(row["step"], row.keys()) for row in rows(workdir)]


def test_finished_run_is_evaluated_again_and_left_as_it_is(tmp_path, whole, capsys):
    expected = whole[1]
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")}
    metrics = (tmp_path / "metrics.jsonl").read_text()
    capsys.readouterr()
    assert trainer.train_and_evaluate(tiny_config(), tmp_path) == expected
    assert "This run is finished" in capsys.readouterr().out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.npz")} == files
    assert (tmp_path / "metrics.jsonl").read_text() == metrics
    # But a result that is cut off is written again.
    final = tmp_path / "final.npz"
    contents = final.read_bytes()
    final.write_bytes(contents[: len(contents) // 2])
    assert trainer.train_and_evaluate(tiny_config(), tmp_path) == expected
    assert final.read_bytes() == contents
    assert (tmp_path / "metrics.jsonl").read_text() == metrics
    output = capsys.readouterr().out
    assert output.count(f"{final} of {len(contents) // 2:,} bytes is cut off") == 1


def test_a_run_goes_on_from_before_a_damaged_checkpoint(tmp_path, capsys):
    config = tiny_config()
    trainer.train_and_evaluate(config, tmp_path / "whole")
    with killed_at(11):
        trainer.train_and_evaluate(config, tmp_path / "damaged")
    assert saved_steps(tmp_path / "damaged") == [3, 6, 9]
    folder = tmp_path / "damaged" / "checkpoints"
    (folder / "9" / "default" / "manifest.ocdbt").write_bytes(b"")
    capsys.readouterr()
    trainer.train_and_evaluate(config, tmp_path / "damaged")
    output = capsys.readouterr().out
    assert "9 is damaged: default/manifest.ocdbt has 0 bytes, expected" in output
    assert output.count("warning") == 1
    assert "from the checkpoint of step 6" in output
    assert (folder / "9.damaged").exists()
    assert_bit_equal(
        final_params(tmp_path / "damaged"), final_params(tmp_path / "whole")
    )
    assert untimed(tmp_path / "damaged") == untimed(tmp_path / "whole")


def untimed(workdir):
    return [
        {name: x for name, x in row.items() if name != "train/images_per_sec"}
        for row in rows(workdir)
    ]


def stop_at_call(monkeypatch, number):
    """A request to stop is seen when a run asks for it the `number`th time."""
    calls = itertools.count(1)
    requests = lambda step: "SIGTERM" if next(calls) >= number else ""
    monkeypatch.setattr(
        trainer, "stop_requests", lambda deadline: contextlib.nullcontext(requests)
    )


def test_stop_saves_and_does_not_evaluate(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_at_call(patch, 7)
        patch.setattr(evaluators, "evaluate", raise_killed)
        with pytest.raises(
            trainer.RunStopped, match="Stopped at step 6 of 12 by SIGTERM"
        ):
            trainer.train_and_evaluate(tiny_config(), tmp_path)
    assert saved_steps(tmp_path) == [3, 6]
    trainer.train_and_evaluate(tiny_config(), tmp_path)
    assert [row["step"] for row in rows(tmp_path) if "test/top1" in row] == [6, 12]


def test_stop_does_not_wait_for_the_end_of_an_evaluation(tmp_path, monkeypatch):
    """It is seen before each batch: 6 to test on, and 23 and 6 of the probe."""
    config = tiny_config(checkpoint_every=4)
    common.add_evaluator(config, "probe", type="fewshot", every=6, shots=(1000,))
    expected = trainer.train_and_evaluate(config, tmp_path / "whole")
    run = tmp_path / "stopped"
    # In the test and the probe of step 6, which is not due to be saved; then at 12.
    for call, step, saved in (9, 6, [4, 6]), (12, 6, [4, 6]), (45, 12, [6, 8, 12]):
        with monkeypatch.context() as patch:
            stop_at_call(patch, call)
            with pytest.raises(trainer.RunStopped, match=f"Stopped at step {step} of"):
                trainer.train_and_evaluate(config, run)
        assert saved_steps(run) == saved
        assert "probe/1000shot" not in rows(run)[-1]
        assert not (run / "final.npz").exists()
    assert trainer.train_and_evaluate(config, run) == expected
    assert names_by_row(run) == names_by_row(tmp_path / "whole")
    assert_bit_equal(final_params(run), final_params(tmp_path / "whole"))


def test_a_limit_of_time_stops_a_run_which_goes_on(tmp_path, monkeypatch):
    """Time is counted in the steps that are done: one of them takes ten minutes."""
    steps = 0
    original = trainer.build_program

    class Clock:
        @staticmethod
        def monotonic():
            return 600.0 * steps

    def build(*args, **kwargs):
        program = original(*args, **kwargs)

        def train_step(*args):
            nonlocal steps
            steps += 1
            return program.train_step(*args)

        return dataclasses.replace(program, train_step=train_step)

    monkeypatch.setattr(trainer, "build_program", build)
    for module in (trainer, stopping):
        monkeypatch.setattr(module, "time", Clock)
    # A start does one step at least, and the evaluation that the one before gave up.
    for minutes, step in (21, 3), (1, 4), (11, 6), (1, 7):
        config = tiny_config(max_run_secs=60 * minutes)
        message = f"Stopped at step {step} of 12 by max_run_secs"
        with pytest.raises(trainer.RunStopped, match=message):
            trainer.train_and_evaluate(config, tmp_path)
        assert saved_steps(tmp_path)[-1] == step
    config.max_run_secs = 0
    trainer.train_and_evaluate(config, tmp_path)
    train = [row["step"] for row in rows(tmp_path) if "train/loss" in row]
    assert train == list(range(1, 13))
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
    stop_at_call(monkeypatch, 1)
    with pytest.raises(trainer.RunStopped, match="by SIGTERM before the first step"):
        trainer.train_and_evaluate(tiny_config(), tmp_path)
    assert not any((tmp_path / "checkpoints").iterdir())


def test_another_config_is_refused_and_changes_nothing(tmp_path, whole):
    shutil.copytree(whole[0], tmp_path, dirs_exist_ok=True)
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    config = tiny_config(base_lr=0.5, eval_every=3, **{"pp.flip": True})
    with pytest.raises(trainer.ConfigError) as error:
        trainer.train_and_evaluate(config, tmp_path)
    message = str(error.value)
    assert "base_lr: 0.003 there, 0.5 now" in message
    assert "pp.flip: False there, True now" in message
    assert "eval_every: 6 there, 3 now (may change)" in message
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
        assert re.search("not be saved either: DiskError: .*No space left", text)
    assert "NonFiniteError: Step 1: the loss on test is nan" in log


def test_workdir_of_a_failed_start_can_be_used_again(tmp_path):
    from mixer_jax.data.dataset import DatasetError

    with pytest.raises(DatasetError):
        trainer.train_and_evaluate(tiny_config(dataset="/no/folder"), tmp_path)
    trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)


def test_pretrained_parameters_but_for_the_head(tmp_path, whole):
    folder = tmp_path / "files"
    folder.mkdir()
    shutil.copy(whole[0] / "final.npz", folder / "digits.npz")
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


def test_what_the_result_does_not_depend_on_may_change_and_is_written_down(
    tmp_path, whole
):
    config = tiny_config(progress_every=5)
    common.add_evaluator(config, "train_too", split="train[:64]")
    changed = config.copy_and_resolve_references()
    changes = {
        "batch_eval": [64, 128],
        "checkpoint_every": [3, 4],
        "eval_every": [6, 4],
        "evals.train_too.every": [0, 3],
        "keep_checkpoints": [3, 1],
        "max_run_secs": [0, 10_000],
        "prefetch": [2, 1],
        "profile_steps": [0, 1],
        "progress_every": [5, 4],
        "workers": [None, 2],
    }
    changed.update_from_flattened_dict({key: new for key, (_, new) in changes.items()})
    losses, run = list(train_losses(whole[0]).values()), tmp_path / "killed"
    with killed_at(7):
        trainer.train_and_evaluate(config, run)
    results = trainer.train_and_evaluate(changed, run)
    assert_bit_equal(final_params(run), final_params(whole[0]))
    assert results == pytest.approx(whole[1], rel=1e-6)
    # A row still is the mean over the steps since the last one, of 3 after the change.
    assert train_losses(run) == {
        stop: sum(losses[stop - count : stop]) / count
        for stop, count in ((5, 5), (8, 3), (12, 4))
    }
    found = {n: [r["step"] for r in rows(run) if n in r] for n in TESTED}
    assert found == {"test/loss": [6, 8, 12], "train_too/loss": [6, 9, 12]}
    assert saved_steps(run) == [12]
    (entry,) = json.loads((run / "config.json").read_text())["history"]
    assert entry["step"] == 6
    assert entry["changed"] == changes
    changed.mesh.fsdp = 2
    trainer.train_and_evaluate(changed, run)
    history = json.loads((run / "config.json").read_text())["history"]
    assert history[0] == entry
    assert [x["changed"] for x in history[1:]] == [{"mesh.fsdp": [1, 2]}]
    trainer.train_and_evaluate(changed, run)  # which changes nothing
    assert json.loads((run / "config.json").read_text())["history"] == history


TESTED = ("test/loss", "train_too/loss")


def train_losses(workdir):
    return {r["step"]: r["train/loss"] for r in rows(workdir) if "train/loss" in r}


def constant(**overrides):
    return tiny_config(decay_type="constant", **overrides)


@pytest.mark.parametrize(
    "unit", ["steps", pytest.param("epochs", marks=pytest.mark.slow)]
)
def test_a_longer_run_continues_one_whose_schedule_is_the_same(tmp_path, unit):
    """Finished or not, it ends as one that had this length from the start."""
    if unit == "steps":
        short, long = constant(total_steps=6), constant(total_steps=12)
    else:
        epoch = 1433 / 16
        short, long = (
            constant(total_steps=0, total_epochs=steps / epoch) for steps in (6, 12)
        )
    expected = trainer.train_and_evaluate(long, tmp_path / "whole")
    run = tmp_path / "short"
    trainer.train_and_evaluate(short, run)
    with killed_at(10):
        trainer.train_and_evaluate(long, run)
    assert not (run / "final.npz").exists()  # which would look like the result
    assert trainer.train_and_evaluate(long, run) == expected
    assert_bit_equal(final_params(run), final_params(tmp_path / "whole"))
    assert train_losses(run) == train_losses(tmp_path / "whole")
    (entry,) = json.loads((run / "config.json").read_text())["history"]
    assert (entry["step"], *entry["changed"]) == (6, f"total_{unit}")
    before = (run / "config.json").read_text()
    with pytest.raises(trainer.ConfigError, match=r"and now 6\. Step 12 is done"):
        trainer.train_and_evaluate(short, run)
    assert (run / "config.json").read_text() == before
    assert (run / "final.npz").exists()


def test_evaluation_of_an_image_with_several_labels_is_as_before(tmp_path, tfds_dir):
    """In a run that trains on one label, any of several is right (ReaL)."""
    config = tiny_config(dataset="tiny_shapes", tfds_data_dir=tfds_dir, batch_eval=16)
    common.add_evaluator(config, "real", label_key="real_label")
    trainer.train_and_evaluate(config, tmp_path)
    found = [row for row in rows(tmp_path) if "real/count" in row]
    assert found[-1].keys() == {"step", "real/top1", "real/loss", "real/count"}
