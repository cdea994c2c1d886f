"""mixer-jax data check, mixer-jax data preview and mixer-jax plot."""

import pathlib
import sys
import typing

import cv2
import pytest

from mixer_jax import cli
from mixer_jax.data.preprocess import EVALUATIONS

from .examples import write_folder, write_mixed_folder

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"


@pytest.fixture
def mixer_jax(monkeypatch, capsys):
    """Runs the command in this process; gives its status, or message, and output."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mixer-jax", *map(str, args)])
        monkeypatch.setattr(sys, "path", list(sys.path))
        status = 0
        try:
            cli.main()
        except SystemExit as stop:
            status = stop.code
        return status, capsys.readouterr().out

    return run


def test_check_lists_what_is_damaged_and_fails(tmp_path, mixer_jax):
    damaged = write_mixed_folder(tmp_path / "photos", 30, 8)
    status, output = mixer_jax("data", "check", tmp_path / "photos")
    assert status == 1
    assert "8 of 30 images cannot be read:" in output
    for file in damaged:
        assert f"  {file}: " in output
    assert "the file is empty" in output
    assert ": a web page" in output


def test_check_of_chosen_splits(tmp_path, mixer_jax):
    root = write_folder(tmp_path / "photos", {"train/a": 4, "test/a": 2})
    (root / "test/a/empty.jpg").touch()
    status, output = mixer_jax("data", "check", root, "--split", "train", "train[:50%]")
    assert status == 0
    assert "All 6 images can be read." in output
    assert "2 images are in several splits" in output
    status, _ = mixer_jax("data", "check", root)
    assert status == 1
    status, _ = mixer_jax("data", "check", root, "--split", "valid")
    assert "no split 'valid'" in status


def test_check_of_images_with_several_labels(tfds_dir, mixer_jax):
    where = ("tiny_shapes", "--tfds-data-dir", tfds_dir)
    status, output = mixer_jax("data", "check", *where, "--label-key", "real_label")
    assert status == 0
    assert "(no label)" in output
    status, output = mixer_jax("data", "check", *where)
    assert status == 0
    assert "(no label)" not in output
    status, _ = mixer_jax("data", "check", *where, "--label-key", "real")
    assert "no image with a class real" in status


def test_preview_with_an_argument_and_overrides(tmp_path, mixer_jax):
    root = write_folder(tmp_path / "photos", {"train/a": 3, "train/b": 1, "test/a": 3})
    output = tmp_path / "sub" / "preview.png"
    status, printed = mixer_jax(
        *("data", "preview", "--config.pp.crop=64", f"{CONFIGS / 'b16.py'}:{root}"),
        *("--config.model.patches.size=(32, 32)", "--rows=1", "--output", output),
        "--config.mesh.fsdp=256",  # the preview needs no such devices
    )
    assert status == 0
    assert printed == f"{output}\n"
    assert cv2.imread(str(output)) is not None


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["digits.py", "--config.base_lrs=1"], "The config has no key 'base_lrs'"),
        (["digits.py", "--config.batch=many"], "--config.batch=many"),
        (["digits.py", "--config.dataset=/no"], "There is no folder"),
        (["digits.py", "--config.pp.evaluation=x"], "pp.evaluation is 'x'"),
        (["digits.py", "--rows=0"], "--rows is 0"),
        (["digit.py"], "There is no config"),
    ],
)
def test_mistakes_in_a_preview(tmp_path, mixer_jax, args, message):
    output = tmp_path / "preview.png"
    file, *flags = args
    status, _ = mixer_jax("data", "preview", CONFIGS / file, "--output", output, *flags)
    assert message in status
    assert not output.exists()


def test_plot(tmp_path, mixer_jax):
    status, _ = mixer_jax("plot", tmp_path)
    assert f"Is {tmp_path} a run's workdir?" in status
    row = '{"step": 10, "train/loss": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_text(row)
    output = tmp_path / "out.png"
    assert mixer_jax("plot", tmp_path, "--output", output) == (0, f"{output}\n")
    assert cv2.imread(str(output)) is not None
    (tmp_path / "metrics.jsonl").write_text("")
    status, _ = mixer_jax("plot", tmp_path)
    assert "no metrics yet" in status


def test_the_command_line_takes_every_evaluation():
    assert typing.get_args(cli.Evaluation) == tuple(EVALUATIONS)


def test_configs_are_read_as_train_py_reads_them():
    config = cli.load_config(f"{CONFIGS / 'b16.py'}:cifar100", ["config.base_lr=1"])
    assert config.dataset == "cifar100"
    assert config.base_lr == 1.0
    assert config.is_locked
