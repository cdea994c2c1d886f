"""What parameters say of themselves travels through a run that starts from them."""

import json
import shutil

import cv2
import jax
import numpy as np
import pytest

import mixer_jax
from mixer_jax import cli
from mixer_jax.run import trainer
from mixer_jax.run.loading import load_model
from mixer_jax.run.paths import with_absolute_paths
from mixer_jax.run.settings import settings_of_source
from mixer_jax.run.workdir import open_workdir
from mixer_jax.variants import Patches, Variant
from mixer_jax.weights import layout, names, npz, pytorch
from mixer_jax.weights.about import About, write_beside
from mixer_jax.weights.hub import is_hub_name

from ..examples import photographs
from .test_trainer import rows, tiny_config

SIZES = layout.MixerSizes(Variant(Patches((4, 4)), 2, 16, 8, 16), 4, 10)
ERF = {"model.gelu": "erf", "model.layer_norm_epsilon": 1e-5}
TANH = {"model.gelu": "tanh", "model.layer_norm_epsilon": 1e-6}
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
SHORT = {"total_steps": 4, "eval_every": 4, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A folder with files of each kind, for the model of tiny_config."""
    folder = tmp_path_factory.mktemp("files")
    rng = np.random.default_rng(0)
    shapes = SIZES.shapes()
    params = layout.unflatten(
        {k: 0.1 * rng.standard_normal(s, "float32") for k, s in shapes.items()}
    )
    for package in names.PACKAGES:
        pytorch.save_pytorch(
            folder / f"{package}.safetensors", params, package, About()
        )
    npz.save_checkpoint(folder / "plain.npz", params)
    npz.save_checkpoint(folder / "colors.npz", params)
    colors = dict(zip(("mean", "std"), IMAGENET, strict=True))
    write_beside(folder / "colors.npz", About({"gelu": "erf"}, colors))
    return folder


def settings(config):
    return {
        key: config[key.partition(".")[0]][key.partition(".")[2]]
        for key in (*ERF, "pp.mean", "pp.std")
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("timm.safetensors", {**TANH, "model.gelu": "erf"}),
        ("mlp-mixer-pytorch.safetensors", ERF),
        ("plain.npz", TANH),
        ("colors.npz", {**TANH, "model.gelu": "erf"}),
        ("", TANH),
    ],
)
def test_settings_come_from_the_file(files, tmp_path, name, expected):
    config = tiny_config(pretrained_dir=str(files / name) if name else "")
    found, notes = settings_of_source(config, tmp_path)
    mean, std = IMAGENET if name == "colors.npz" else (0.5, 0.5)
    assert settings(found) == {**expected, "pp.mean": mean, "pp.std": std}
    said = [note.text for note in notes]
    assert len(said) == (expected != TANH)
    if said:
        assert said[0].startswith(f"taken    from {files / name}: model.gelu=erf")
    assert set(settings(config).values()) == {None}  # the caller's config stays


def test_what_is_given_wins_with_a_warning_if_it_contradicts(files, tmp_path):
    given = {"model.gelu": "tanh", "pp.mean": 0.0, "model.layer_norm_epsilon": 1e-6}
    config = tiny_config(pretrained_dir=str(files / "colors.npz"), **given)
    found, notes = settings_of_source(config, tmp_path)
    assert settings(found) == {**given, "pp.std": IMAGENET[1]}
    where = files / "colors.npz"
    assert [note.text for note in notes] == [
        f"model.gelu is tanh, but {where} was trained with erf",
        f"pp.mean is 0.0, but {where} was trained with {IMAGENET[0]}",
        f"taken    from {where}: pp.std={IMAGENET[1]}",
    ]
    same = {"model.gelu": "erf", "pp.mean": IMAGENET[0], "pp.std": IMAGENET[1]}
    config = tiny_config(pretrained_dir=str(where), **same)
    assert settings_of_source(config, tmp_path)[1] == []


def test_a_fork_without_the_fields(files, tmp_path):
    config = tiny_config(pretrained_dir=str(files / "mlp-mixer-pytorch.safetensors"))
    with config.unlocked():
        del config.model["gelu"], config.model["layer_norm_epsilon"]
    found, notes = settings_of_source(config, tmp_path)
    assert (found.pp.mean, found.pp.std, notes) == (0.5, 0.5, [])
    assert "gelu" not in found.model


@pytest.fixture(scope="module")
def run(files, tmp_path_factory):
    """A run from timm's file, its head new, that the file's absence does not stop."""
    workdir = tmp_path_factory.mktemp("run")
    path = files / "timm.safetensors"
    config = tiny_config(pretrained_dir=str(path), **SHORT)
    results = trainer.train_and_evaluate(config, workdir)
    return workdir, config, results


def test_a_run_records_them_and_continues_without_the_file(run, files):
    workdir, config, results = run
    log = (workdir / "train.log").read_text()
    assert f"taken    from {files}/timm.safetensors: model.gelu=erf\n" in log
    assert f"start    from {files}/timm.safetensors, with a new head" in log
    recorded = json.loads((workdir / "config.json").read_text())
    assert recorded["model"]["gelu"] == "erf"
    assert recorded["model"]["layer_norm_epsilon"] == 1e-6
    assert (recorded["pp"]["mean"], recorded["pp"]["std"]) == (0.5, 0.5)
    path = files / "timm.safetensors"
    path.rename(files / "moved")
    try:
        assert trainer.train_and_evaluate(config, workdir) == results
    finally:
        (files / "moved").rename(path)
    other = tiny_config(pretrained_dir=str(path), **SHORT, **{"model.gelu": "tanh"})
    with pytest.raises(trainer.ConfigError, match=r"model\.gelu: erf there, tanh now"):
        trainer.train_and_evaluate(other, workdir)


def test_a_run_of_before_the_keys_continues(run, tmp_path):
    workdir, config, results = run
    path = workdir / "config.json"
    before = path.read_text()
    older = json.loads(before)
    del older["model"]["layer_norm_epsilon"], older["pp"]["mean"], older["pp"]["std"]
    path.write_text(json.dumps(older))
    given = {"init_from": str(workdir), "model.layer_norm_epsilon": 1e-5}
    given |= {"model.gelu": "erf", "pp.mean": 0.0, "pp.std": 0.5}
    try:
        assert trainer.train_and_evaluate(config, workdir) == results
        _, notes = settings_of_source(tiny_config(**given), tmp_path)
    finally:
        path.write_text(before)
    assert [note.text for note in notes] == [
        f"model.layer_norm_epsilon is 1e-05, but {workdir} was trained with 1e-06",
        f"pp.mean is 0.0, but {workdir} was trained with 0.5",
    ]


def test_a_relative_path_whose_folder_is_gone(run, files, tmp_path, monkeypatch):
    """ "a/b" then looks like a name of the hub."""
    _, config, _ = run
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").symlink_to(files / "timm.safetensors")
    config = config.copy_and_resolve_references()
    config.pretrained_dir = "a/b"
    open_workdir(config, "run")
    (tmp_path / "run" / "checkpoints" / "12").mkdir(parents=True)
    recorded, _ = with_absolute_paths(config)
    (tmp_path / "run" / "config.json").write_text(recorded.to_json())
    shutil.rmtree(tmp_path / "a")
    assert is_hub_name("a/b")
    assert open_workdir(config, "run") == tmp_path / "run"
    config.pretrained_dir = "a/c"
    with pytest.raises(trainer.ConfigError, match=r"a/b there, a/c now"):
        open_workdir(config, "run")


def test_a_workdir_that_cannot_be_one_is_refused_before_a_file_is_fetched(monkeypatch):
    config = tiny_config(pretrained_dir="imagenet1k/Mixer-B_16")
    monkeypatch.setattr("mixer_jax.run.settings.open_source", None)
    with pytest.raises(trainer.ConfigError, match=r"is gs://bucket/run, a URL"):
        settings_of_source(config, "gs://bucket/run")


def test_a_run_is_a_source_too(run, tmp_path):
    workdir, _, _ = run
    for values in ({"init_from": str(workdir)}, {"pretrained_dir": str(workdir)}):
        found, notes = settings_of_source(tiny_config(**values), tmp_path)
        assert found.model.gelu == "erf"
        assert [x.text for x in notes] == [f"taken    from {workdir}: model.gelu=erf"]
    assert load_model(workdir / "final.npz").model.gelu == "erf"
    final = npz.read_checkpoint(workdir / "final.npz")
    for name in (workdir, workdir / "final.npz"):
        jax.tree.map(
            np.testing.assert_array_equal, mixer_jax.load_checkpoint(name), final
        )
        fresh = layout.unflatten(
            {k: np.zeros(s, "float32") for k, s in SIZES.shapes().items()}
        )
        params = mixer_jax.load_pretrained(name, fresh)
        assert not params["head"]["kernel"].any()
        np.testing.assert_array_equal(params["stem"]["kernel"], final["stem"]["kernel"])


def test_no_command_needs_to_be_told(run, tmp_path, monkeypatch, capsys):
    """evaluate, predict, export and convert, with no --gelu anywhere."""
    workdir, _, _ = run

    def command(*args):
        monkeypatch.setattr("sys.argv", ["mixer-jax", *map(str, args)])
        cli.main()
        return capsys.readouterr().out

    picture = tmp_path / "a.png"
    cv2.imwrite(str(picture), photographs()[0])
    command("evaluate", workdir, "--json-file", tmp_path / "report.json")
    report = json.loads((tmp_path / "report.json").read_text())
    last = [row for row in rows(workdir) if "test/loss" in row][-1]
    assert report["loss"] == pytest.approx(last["test/loss"], rel=1e-5)
    expected = command("predict", workdir, picture, "--format", "json")
    command("export", workdir, tmp_path / "a.stablehlo")
    about = json.loads((tmp_path / "a.stablehlo.json").read_text())
    assert (about["gelu"], about["layer_norm_epsilon"]) == ("erf", 1e-6)
    # Each file that convert writes gives what the run gives, and so on for its copies.
    source = workdir
    for name, options in (
        ("a.npz", []),
        ("a.safetensors", []),
        ("b.safetensors", ["--to", "mlp-mixer-pytorch"]),
        ("b.npz", []),
    ):
        command("convert", source, tmp_path / name, *options)
        source = tmp_path / name
        found = command("predict", source, picture, "--format", "json")
        assert json.loads(found) == json.loads(expected)
        assert load_model(source).class_names == load_model(workdir).class_names


def test_fine_tuning_a_model_of_mlp_mixer_pytorch(golden, tmp_path):
    """Its images are not square: the config says how high and wide they are."""
    path = golden.path / "mlp_mixer_pytorch.safetensors"
    sizes = {"num_blocks": 3, "hidden_dim": 24, "tokens_mlp_dim": 96}
    sizes |= {"channels_mlp_dim": 12, "patches.size": (8, 8)}
    values = {f"model.{key}": value for key, value in sizes.items()} | SHORT
    values |= {"pp.crop": (32, 48), "pretrained_dir": str(path), "base_lr": 1e-3}
    trainer.train_and_evaluate(tiny_config(**values), tmp_path / "run")
    loaded = load_model(tmp_path / "run")
    assert (loaded.model.gelu, loaded.model.layer_norm_epsilon) == ("erf", 1e-5)
    before, after = pytorch.read_pytorch(path), loaded.params
    assert after["head"]["kernel"].shape == (24, 10)
    moved = np.abs(after["stem"]["kernel"] - before["stem"]["kernel"]).max()
    assert 0 < moved < 0.01
    init = jax.tree.map(np.zeros_like, after)
    start = mixer_jax.load_pretrained(path, init)
    assert not start["head"]["kernel"].any()
    for name in before.keys() - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, start[name], before[name])
