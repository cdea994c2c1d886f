"""Forks: someone changes model.py and nothing else, and everything goes on working.

Each test copies train.py, configs and mixer_jax, changes the copy of model.py, and uses
it as its owner would: from the command line, in processes of their own.
"""

import importlib.util
import json
import os
import pathlib
import shutil
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest

from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.decode import decode
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.variants import Patches, Variant
from mixer_jax.weights import layout

from .examples import gating_fork

ROOT = pathlib.Path(__file__).parents[1]
HAS_ONNX = importlib.util.find_spec("jax2onnx") is not None

# Two steps on digits, then two more.
CONFIG = [
    "--config=configs/digits.py",
    "--config.pp.train=train[:64]",
    "--config.pp.test=test[:40]",
    "--config.model.num_blocks=2",
    "--config.model.hidden_dim=12",
    "--config.model.tokens_mlp_dim=6",
    "--config.model.channels_mlp_dim=20",
    "--config.batch=16",
    "--config.batch_eval=40",
    "--config.warmup_steps=1",
    "--config.total_steps=4",
    "--config.checkpoint_every=2",
    "--config.progress_every=1",
]
PUBLISHED = layout.MixerSizes(Variant(Patches((4, 4)), 2, 12, 6, 20), 16, 1000)

# Runs several commands in one process, to import and compile once.
COMMANDS = """
import json, sys
from mixer_jax import cli

for args in json.loads(sys.argv[1]):
    sys.argv = ["mixer-jax", *args]
    cli.main()
"""


class Fork:
    """A checkout whose model.py is another."""

    def __init__(self, folder, model):
        self.folder = folder
        for name in ("mixer_jax", "configs"):
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / "train.py", folder)
        (folder / "mixer_jax" / "model.py").write_text(model)

    def python(self, *args):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", *args],
            cwd=self.folder,
            capture_output=True,
            text=True,
            timeout=300,
            env=os.environ
            | {
                "JAX_PLATFORMS": "cpu",
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
                "PYTHONPATH": str(self.folder),
            },
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def train(self, workdir, *args):
        return self.python("train.py", *CONFIG, f"--workdir={workdir}", *args)

    def commands(self, *commands):
        commands = [[str(x) for x in args] for args in commands]
        return self.python("-c", COMMANDS, json.dumps(commands))


def read(path):
    with np.load(path) as file:
        return dict(file)


def write_published(path):
    """A file in the published layout, of random numbers and 1000 classes."""
    rng = np.random.default_rng(0)
    shapes = PUBLISHED.shapes()
    arrays = {k: 0.1 * rng.standard_normal(s, "f4") for k, s in shapes.items()}
    path.parent.mkdir()
    np.savez(path, **arrays)
    return arrays


def last_row(workdir, name):
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row][-1]


def use(fork, endings, *options):
    """Trains, resumes, evaluates, predicts, exports, draws; returns the parameters."""
    run = fork.folder / "run"
    fork.train(run, *options)
    params = read(run / "final.npz")

    # A run that was killed after its second step, and started again.
    killed = fork.folder / "killed"
    shutil.copytree(run / "checkpoints" / "2", killed / "checkpoints" / "2")
    for name in ("config.json", "class_names.json"):
        shutil.copy(run / name, killed)
    assert "from the checkpoint of step 2" in fork.train(killed, *options)
    resumed = read(killed / "final.npz")
    assert resumed.keys() == params.keys()
    for key, array in params.items():
        np.testing.assert_array_equal(resumed[key], array, err_msg=key)
    assert last_row(killed, "test/loss") == last_row(run, "test/loss")

    pictures = fork.folder / "pictures"
    pictures.mkdir()
    test = open_dataset("digits").split("test[:8]")
    for i in range(8):
        cv2.imwrite(str(pictures / f"{i}.png"), test[i].image)
    (killed / "final.npz").unlink()  # a run that is going on
    printed = fork.commands(
        ("evaluate", run, "--json-file", run / "report.json"),
        ("evaluate", killed, "--json-file", killed / "report.json"),
        ("predict", run, pictures, "--format", "json", "--output", run / "predicted"),
        *(("export", run, run / f"model.{ending}") for ending in endings),
        ("export", run, run / "features.stablehlo", "--features"),
        ("convert", run, run / "converted.npz"),
        ("inspect", run),
        ("plot", "weights", run, "--output", run / "weights.png"),
        ("plot", "mixing", run, pictures / "0.png", "--output", run / "mixing.png"),
    )
    assert f"parameters  {sum(x.size for x in params.values()):,}, " in printed
    for workdir in (run, killed):
        report = json.loads((workdir / "report.json").read_text())
        for name in ("loss", "top1"):
            expected = last_row(run, f"test/{name}")
            assert report[name] == pytest.approx(expected, rel=1e-5)
    converted = read(run / "converted.npz")
    for key, array in params.items():
        np.testing.assert_array_equal(converted[key], array, err_msg=key)

    assert decode((run / "weights.png").read_bytes()).std() > 10
    assert decode((run / "mixing.png").read_bytes()).std() > 10

    predictions = json.loads((run / "predicted").read_text())
    transform = EvalTransform(16)
    images = [decode((pictures / f"{i}.png").read_bytes()) for i in range(8)]
    images = np.stack([transform(image) for image in images])
    for ending in endings:
        logits = call(run / f"model.{ending}", images)
        for x, scores in zip(predictions, jax.nn.softmax(logits), strict=True):
            found = np.asarray(scores)[x["classes"]]
            np.testing.assert_allclose(found, x["probabilities"], atol=1e-5)
    features = call(run / "features.stablehlo", images)
    logits = features @ params["head/kernel"] + params["head/bias"]
    np.testing.assert_allclose(call(run / "model.stablehlo", images), logits, atol=1e-5)
    about = json.loads((run / "features.stablehlo.json").read_text())
    assert about["output"]["shape"] == ["n", 12]
    return params


def call(path, images):
    """The outputs of an exported file."""
    if path.suffix == ".stablehlo":
        call = jax.export.deserialize(bytearray(path.read_bytes())).call
        return np.asarray(call(images))
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images})[0]


def start_from_file(fork, *options):
    """Starts a run from a published-layout file; returns its log, results and file."""
    arrays = write_published(fork.folder / "weights" / "digits.npz")
    started = fork.folder / "started"
    log = fork.train(
        started,
        f"--config.pretrained_dir={fork.folder / 'weights'}",
        "--config.base_lr=1e-30",  # the parameters stay as they were at the start
        *options,
    )
    return log, read(started / "final.npz"), arrays


def test_a_fork_that_adds_a_parameter(tmp_path):
    """Layer scale: each branch is multiplied by a learned factor for each channel."""
    model = (ROOT / "mixer_jax" / "model.py").read_text()
    before = "        return x + keep[1] * y\n"
    assert model.count(before) == 1
    gamma = 'self.param("gamma", nn.initializers.constant(0.1), (x.shape[-1],))'
    changed = f"        gamma = {gamma}\n        return x + keep[1] * gamma * y\n"
    fork = Fork(tmp_path, model.replace(before, changed))

    params = use(fork, ["stablehlo"])
    for i in (0, 1):
        assert params[f"MixerBlock_{i}/gamma"].shape == (12,)
    assert params.keys() - PUBLISHED.shapes().keys() == {
        f"MixerBlock_{i}/gamma" for i in (0, 1)
    }

    log, started, file = start_from_file(fork)
    assert "new      2 x MixerBlock_*/gamma: not in" in log
    assert "left out" not in log
    np.testing.assert_array_equal(started["MixerBlock_1/gamma"], np.float32([0.1] * 12))
    for key, array in file.items():
        if not key.startswith("head/"):
            np.testing.assert_array_equal(started[key], array, err_msg=key)
    assert started["head/kernel"].shape == (12, 10)


def test_the_change_in_the_docs_is_short_and_as_python_is_written_here(tmp_path):
    diff = (ROOT / "tests" / "forks" / "gating.diff").read_text()
    assert f"```diff\n{diff}```\n" in (ROOT / "docs" / "fork.md").read_text()
    added = [x for x in diff.splitlines() if x.startswith("+") and x.strip("+ ")]
    assert len(added) - 1 <= 20  # the first one names the file
    gating_fork(tmp_path / "gating")
    model = tmp_path / "gating" / "mixer_jax" / "model.py"
    for command in (["format", "--check"], ["check"]):
        ruff = [sys.executable, "-m", "ruff", *command]
        subprocess.run([*ruff, "--config", ROOT / "pyproject.toml", model], check=True)


@pytest.mark.slow
def test_a_fork_with_another_block_and_a_field(tmp_path):
    """The change of docs/fork.md: a spatial gating unit, with a field of its own."""
    fork = Fork(tmp_path / "fork", gating_fork(tmp_path / "gating"))
    options = ["--config.model.gate_dim=5"]

    params = use(fork, ["stablehlo", "onnx"][: 1 + HAS_ONNX], *options)
    assert params["MixerBlock_1/spatial_gating/Dense_0/kernel"].shape == (12, 10)
    assert not [key for key in params if "token_mixing" in key]

    log, started, file = start_from_file(fork, *options)
    assert "2 x MixerBlock_*/spatial_gating/Dense_1/kernel" in log
    left_out = next(x for x in log.splitlines() if x.startswith("left out"))
    assert left_out.count("2 x MixerBlock_*/token_mixing/Dense_") == 4
    assert "channel_mixing" not in left_out
    gate = started["MixerBlock_0/spatial_gating/Dense_1/bias"]
    np.testing.assert_array_equal(gate, np.ones(16, "float32"))
    taken = started.keys() & file.keys() - {"head/kernel", "head/bias"}
    assert len(taken) == 4 + 2 * 8
    for key in taken:
        np.testing.assert_array_equal(started[key], file[key], err_msg=key)

    # The run's own file, into the same model: all of it, but for the head.
    (fork.folder / "own").mkdir()
    shutil.copy(fork.folder / "run" / "final.npz", fork.folder / "own" / "digits.npz")
    again = fork.folder / "again"
    log = fork.train(
        again,
        f"--config.pretrained_dir={fork.folder / 'own'}",
        "--config.base_lr=1e-30",
        *options,
    )
    assert "new  " not in log
    again = read(again / "final.npz")
    for key, array in params.items():
        same = np.array_equal(again[key], array)
        assert same != key.startswith("head/"), key

    # Started from as a run, its head is taken too.
    initialized = fork.folder / "initialized"
    fork.train(
        initialized,
        f"--config.init_from={fork.folder / 'run'}",
        "--config.base_lr=1e-30",
        *options,
    )
    initialized = read(initialized / "final.npz")
    assert initialized.keys() == params.keys()
    for key, array in params.items():
        np.testing.assert_array_equal(initialized[key], array, err_msg=key)

    # The same at another size of images: its own token mixing is adapted too.
    larger = fork.folder / "larger"
    log = fork.train(
        larger,
        f"--config.pretrained_dir={fork.folder / 'own'}",
        "--config.pp.crop=24",
        "--config.resolution=interpolate",
        *options,
    )
    assert "digits.npz by interpolate from 4x4 patches to 6x6" in log
    kernel = read(larger / "final.npz")["MixerBlock_0/spatial_gating/Dense_1/kernel"]
    assert kernel.shape == (36, 36)
