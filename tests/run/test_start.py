"""Runs that start from another run, or from a file."""

import json

import flax.linen as nn
import numpy as np
import pytest

from mixer_jax.data import dataset as datasets
from mixer_jax.run import start, trainer
from mixer_jax.weights.layout import CheckpointError, flatten

from ..examples import write_folder
from .test_trainer import assert_bit_equal, final_params, killed_at, rows, tiny_config

STILL = {"base_lr": 0.0, "weight_decay": 0.0, "total_steps": 1, "eval_every": 1}
CLASSES = ["ant", "bee", "cow", "dog"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs of four classes, and tables of some of them in an order."""
    root = tmp_path_factory.mktemp("data")
    write_folder(root / "photos", {f"all/{name}": 6 for name in [*CLASSES, "eel"]})

    def table(name, classes):
        (root / name).mkdir()
        lines = ["path,label,split"]
        for label in classes:
            files = sorted((root / "photos" / "all" / label).iterdir())
            lines += [f"{x},{label},train" for x in files]
            lines += [f"{x},{label},test" for x in files[:3] if label in CLASSES[:3]]
        (root / name / "t.csv").write_text("\n".join(lines) + "\n")
        (root / name / "classes.txt").write_text("\n".join(classes) + "\n")
        return str(root / name / "t.csv")

    return table


@pytest.fixture(scope="module")
def source(photos, tmp_path_factory):
    """A finished run on CLASSES, and what its last evaluation gave."""
    workdir = tmp_path_factory.mktemp("source")
    config = tiny_config(dataset=photos("source", CLASSES))
    return workdir, config, trainer.train_and_evaluate(config, workdir)


def test_the_same_classes_have_the_same_head_and_numbers(source, tmp_path, capsys):
    workdir, config, expected = source
    config = tiny_config(dataset=config.dataset, init_from=str(workdir), **STILL)
    assert trainer.train_and_evaluate(config, tmp_path) == expected
    assert_bit_equal(final_params(tmp_path), final_params(workdir))
    assert (
        f"start    from {workdir}/final.npz, with its head for 4 classes of the same "
        "name; 0 classes are new, 0 of the 4 there are dropped"
    ) in capsys.readouterr().out
    assert rows(tmp_path)[0]["step"] == 1  # steps begin anew


@pytest.mark.parametrize(
    ("classes", "counts"),
    [
        (
            ["dog", "ant", "cow", "bee"],
            "4 classes of the same name; 0 classes are new, 0",
        ),
        (["cow", "bee", "ant"], "3 classes of the same name; 0 classes are new, 1"),
        (
            ["eel", *CLASSES[::-1]],
            "4 classes of the same name; 1 classes are new, 0",
        ),
        (
            ["eel", "cow", "bee", "ant"],
            "3 classes of the same name; 1 classes are new, 1",
        ),
    ],
    ids=["permuted", "fewer", "more", "other"],
)
def test_the_head_is_kept_for_classes_of_the_same_name(
    source, photos, tmp_path, capsys, classes, counts, request
):
    workdir, _, _ = source
    dataset = photos(request.node.callspec.id, classes)
    config = tiny_config(
        dataset=dataset, init_from=str(workdir), head_bias_init=-50.0, **STILL
    )
    result = trainer.train_and_evaluate(config, tmp_path)
    assert counts in capsys.readouterr().out
    old, new = final_params(workdir), final_params(tmp_path)
    old_head, new_head = old.pop("head"), new.pop("head")
    assert_bit_equal(new, old)
    assert old_head["kernel"].any()
    for i, name in enumerate(classes):
        if name in CLASSES:
            j = CLASSES.index(name)
            np.testing.assert_array_equal(
                new_head["kernel"][:, i], old_head["kernel"][:, j]
            )
            assert new_head["bias"][i] == old_head["bias"][j]
        else:
            assert not new_head["kernel"][:, i].any()
            assert new_head["bias"][i] == -50
    if classes == ["dog", "ant", "cow", "bee"] or "eel" in classes[:1]:
        # A class whose logit is -50 changes nothing.
        expected = source[2]
        if set(CLASSES) <= set(classes):
            assert result["top1"] == expected["top1"]
            assert result["loss"] == pytest.approx(expected["loss"], rel=1e-5)


def test_a_run_that_is_not_finished(source, tmp_path, capsys):
    config = source[1]
    with killed_at(7):
        trainer.train_and_evaluate(config, tmp_path / "killed")
    more = tiny_config(
        dataset=config.dataset, init_from=str(tmp_path / "killed"), **STILL
    )
    trainer.train_and_evaluate(more, tmp_path / "more")
    assert f"start    from {tmp_path}/killed, step 6, with" in capsys.readouterr().out


def test_training_goes_on_from_there_and_resumes(source, tmp_path):
    workdir, config, _ = source
    more = tiny_config(
        dataset=config.dataset, init_from=str(workdir), **{"model.stoch_depth": 0.0}
    )
    expected = trainer.train_and_evaluate(more, tmp_path / "whole")
    moved = tmp_path / "source"
    workdir.rename(moved)
    try:
        with pytest.raises(CheckpointError, match="is not there"):
            trainer.train_and_evaluate(more, tmp_path / "killed")
        moved.rename(workdir)
        with killed_at(7):
            trainer.train_and_evaluate(more, tmp_path / "killed")
        # The run that it started from is not needed any more.
        workdir.rename(moved)
        assert trainer.train_and_evaluate(more, tmp_path / "killed") == expected
    finally:
        moved.rename(workdir)
    assert_bit_equal(
        final_params(tmp_path / "killed"), final_params(tmp_path / "whole")
    )


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.hidden_dim": 24}, "  model.hidden_dim: 16 there, 24 here\n"),
        ({"model.gelu": "erf"}, "  model.gelu: tanh there, erf here\n"),
        ({"model.patches.size": (2, 2)}, r"  model.patches.size: \[4, 4\] there, \[2"),
        ({"pp.crop": 16}, "  pp.crop: 8 there, 16 here\n"),
    ],
)
def test_another_model_is_refused_before_the_dataset_is_opened(
    source, tmp_path, monkeypatch, values, message
):
    def open_dataset(*args, **kwargs):
        raise AssertionError("a dataset was opened")

    monkeypatch.setattr(datasets, "open_dataset", open_dataset)
    config = tiny_config(init_from=str(source[0]), **values)
    with pytest.raises(trainer.ConfigError, match="a run of another model") as error:
        trainer.train_and_evaluate(config, tmp_path)
    error.match(message)
    assert "model_name" not in str(error.value)


def test_two_places_to_start_from_are_refused(source, tmp_path):
    config = tiny_config(init_from=str(source[0]), pretrained_dir="imagenet21k")
    with pytest.raises(
        trainer.ConfigError, match=r"init_from is .* pretrained_dir imag"
    ):
        trainer.train_and_evaluate(config, tmp_path)


def test_what_to_start_from_is_missed_before_the_dataset_is_opened(
    tmp_path, monkeypatch
):
    def open_dataset(*args, **kwargs):
        raise AssertionError("a dataset was opened")

    monkeypatch.setattr(datasets, "open_dataset", open_dataset)
    (tmp_path / "empty").mkdir()
    for values, message in (
        ({"pretrained_dir": str(tmp_path / "no")}, r"no/digits\.npz: no such file"),
        ({"init_from": str(tmp_path / "no")}, "/no is not there"),
        ({"init_from": str(tmp_path / "empty")}, r"a folder without a config\.json"),
    ):
        with pytest.raises((OSError, CheckpointError), match=message):
            trainer.train_and_evaluate(tiny_config(**values), tmp_path / "run")


def test_a_relative_path_to_start_from_is_kept_absolute(source, tmp_path, monkeypatch):
    workdir, config, _ = source
    monkeypatch.chdir(workdir.parent)
    more = tiny_config(dataset=config.dataset, init_from=workdir.name, **STILL)
    trainer.train_and_evaluate(more, tmp_path)
    recorded = json.loads((tmp_path / "config.json").read_text())
    assert recorded["init_from"] == str(workdir)
    assert recorded["as_typed"] == {"init_from": workdir.name}
    assert set(flatten(final_params(tmp_path))) == set(flatten(final_params(workdir)))


def test_the_axis_of_the_classes_follows_from_the_model():
    """In a fork it need not be the last one, nor in the head alone."""

    class Fork(nn.Module):
        num_classes: int

        @nn.compact
        def __call__(self, inputs, *, train):
            prototypes = self.param(
                "prototypes", nn.initializers.ones, (self.num_classes, 3)
            )
            return (
                nn.Dense(self.num_classes, name="head")(inputs.mean((1, 2)))
                + prototypes.sum()
            )

    axes = start._class_axes(tiny_config(), Fork(3), 3)
    assert axes == {"prototypes": 0, "head/kernel": 1, "head/bias": 0}
