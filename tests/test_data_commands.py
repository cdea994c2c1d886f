"""mixer-jax data check, mixer-jax data preview and mixer-jax plot runs."""

import contextlib
import logging
import os
import pathlib
import subprocess
import sys
import typing

import cv2
import pytest

from mixer_jax import cli
from mixer_jax.cli import models, runs
from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.evaluations import EVALUATIONS
from mixer_jax.data.pipeline import eval_batches
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.data.walk import find_images

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


def test_a_folder_is_read_alike_by_check_and_by_predict(tmp_path, mixer_jax):
    root = write_folder(tmp_path / "photos", {"train/a": 2, "train/b": 2})
    (image, *_) = (root / "train" / "a").iterdir()
    for name in (
        "._x.png",
        ".ipynb_checkpoints/x.png",
        "__MACOSX/x.png",
        "@eaDir/x.png",
    ):
        path = root / "train" / "b" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(image.read_bytes())
    (root / "train" / "b" / "up").symlink_to("..")
    status, output = mixer_jax("data", "check", root)
    assert status == 0
    assert "All 4 images can be read." in output
    assert len(find_images([str(root)])) == 4


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
        (
            ["digits.py", "--config.batch=many"],
            "batch is 'many'; expected a whole number",
        ),
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
    status, _ = mixer_jax("plot", "runs", tmp_path)
    assert f"Is {tmp_path} a run's workdir?" in status
    row = '{"step": 10, "train/loss": 1.5}\n'
    (tmp_path / "metrics.jsonl").write_text(row)
    output = tmp_path / "out.png"
    assert mixer_jax("plot", "runs", tmp_path, "--output", output) == (0, f"{output}\n")
    assert cv2.imread(str(output)) is not None
    (tmp_path / "metrics.jsonl").write_text("")
    status, _ = mixer_jax("plot", "runs", tmp_path)
    assert "no metrics yet" in status


def test_the_command_line_takes_every_evaluation():
    assert typing.get_args(models.Evaluation) == tuple(EVALUATIONS)


def test_configs_are_read_as_train_py_reads_them():
    config = runs.load_config(f"{CONFIGS / 'b16.py'}:cifar100", ["config.base_lr=1"])
    assert config.dataset == "cifar100"
    assert config.base_lr == 1.0
    assert config.is_locked


@pytest.fixture
def byte_names(tmp_path):
    """A folder of a name, with a class and files of names, that are not UTF-8."""
    root = os.fsdecode(bytes(tmp_path) + b"/caf\xe9")
    write_folder(
        pathlib.Path(root), {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1}
    )
    for split in ("train", "test"):
        os.rename(f"{root}/{split}/b", os.fsdecode(os.fsencode(root) + b"/x"))
        os.rename(os.fsencode(root) + b"/x", os.fsencode(f"{root}/{split}") + b"/\xff")
    with open(os.fsencode(root) + b"/train/a/\xfe.jpg", "wb") as file:
        file.write(b"version https://git-lfs.github.com/spec/v1\n")
    return root


def test_names_that_are_not_utf8_are_checked_and_drawn(byte_names, tmp_path):
    """In a process of their own, whose output is bytes."""

    def run(*args):
        code = "from mixer_jax.cli import main; main()"
        command = [sys.executable, "-c", code, "data", *args]
        done = subprocess.run(command, capture_output=True, cwd=CONFIGS.parent)
        return done.returncode, done.stdout.decode(), done.stderr.decode()

    status, output, errors = run("check", byte_names)
    assert status == 1
    assert "caf\\xe9/train/a/\\xfe.jpg: a Git LFS pointer" in output
    assert "\\xff" in output  # the class
    assert "Logging error" not in errors + output
    assert "Traceback" not in errors
    picture = str(tmp_path / "preview.png")
    status, output, errors = run(
        *("preview", f"{CONFIGS / 'digits.py'}", f"--config.dataset={byte_names}"),
        *("--rows=8", "--output", picture),
    )
    assert status == 0, errors
    assert "Logging error" not in errors
    assert "Traceback" not in errors
    assert cv2.imread(picture) is not None


def test_unreadable_images_with_such_names_are_one_line_each(byte_names, caplog):
    source = open_dataset(byte_names).split("train")
    batches = eval_batches(source, EvalTransform(8), batch_size=7)
    caplog.clear()
    with contextlib.closing(batches), caplog.at_level(logging.WARNING):
        (batch,) = batches
    assert batch["mask"].sum() == 6
    (line,) = [record.getMessage() for record in caplog.records]
    line.encode("utf-8")
    assert "\\xfe.jpg: a Git LFS pointer" in line


def test_check_tells_of_one_class(tmp_path, mixer_jax):
    root = write_folder(tmp_path / "photos", {"cat": 2})
    status, output = mixer_jax("data", "check", root)
    assert status == 0
    assert "warning: there is one class (cat)" in output


def test_check_of_a_sum_of_splits_by_other_names(tmp_path, mixer_jax):
    spec = {"Training/a": 2, "Training/b": 1, "Valid/a": 1}
    root = write_folder(tmp_path / "photos", spec)
    status, output = mixer_jax("data", "check", root, "--split", "train+val")
    assert status == 0
    assert "All 4 images can be read." in output


def test_check_of_a_table_with_several_labels(tmp_path, mixer_jax):
    root = write_folder(tmp_path, {"i": 2})
    files = sorted(x.name for x in (root / "i").iterdir())
    (root / "t.csv").write_text(f"path,label\ni/{files[0]},a|b\ni/{files[1]},b\n")
    status, output = mixer_jax("data", "check", root / "t.csv")
    assert status == 0
    assert [x.split()[1:3] for x in output.splitlines()[1:4]] == [
        *(["a", "1"], ["b", "2"], ["all", "2"])
    ]


def test_preview_says_what_would_spoil_the_run(tmp_path, mixer_jax, caplog):
    config, output = CONFIGS / "digits.py", tmp_path / "preview.png"
    status, _ = mixer_jax(
        *("data", "preview", config, "--output", output),
        *("--config.pp.train=train[:90%]", "--config.pp.test=train[50%:]"),
    )
    assert status == 0
    assert "574 examples of the split to test on (train[50%:]) are also" in caplog.text
    one = write_folder(tmp_path / "one", {"train/a": 2, "test/a": 1})
    status, _ = mixer_jax("data", "preview", config, f"--config.dataset={one}")
    assert "has one class (a)" in status
    val = write_folder(tmp_path / "val", {"train/a": 2, "train/b": 2, "val/a": 1})
    caplog.clear()
    status, _ = mixer_jax(
        *("data", "preview", config, f"--config.dataset={val}", "--output", output),
    )
    assert status == 0
    assert "has no split test; val is taken to test on" in caplog.text
