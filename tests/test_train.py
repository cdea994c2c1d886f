"""train.py as a user starts it."""

import contextlib
import json
import os
import pathlib
import shlex
import subprocess
import sys
import types

import pytest
from absl import flags
from ml_collections import config_flags

import mixer_jax
from configs import common
from mixer_jax.run import trainer
from mixer_jax.variants import VARIANTS, Patches, Variant

from .examples import write_folder

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
MODEL_CONFIGS = {
    "b16": "B/16",
    "b32": "B/32",
    "l16": "L/16",
    "l32": "L/32",
    "s8": "S/8",
    "s16": "S/16",
    "s32": "S/32",
    "h14": "H/14",
}

# A Mixer that trains in seconds, at 224 pixels.
SMALL = [
    "--config.model.num_blocks=1",
    "--config.model.patches.size=(32, 32)",
    "--config.model.hidden_dim=16",
    "--config.model.tokens_mlp_dim=8",
    "--config.model.channels_mlp_dim=16",
    "--config.batch=8",
    "--config.batch_eval=8",
    "--config.accum_steps=2",
    "--config.total_steps=4",
]


def train(*args, cwd=ROOT, path="train.py", code="", **env):
    """Runs train.py in a process of its own, on one CPU device."""
    command = [sys.executable, "-W", "ignore", path, *args]
    if code:  # runs before the end of the process
        script = f"import sys; sys.argv = {command[3:]!r}; sys.path.insert(0, '.')"
        script += "\nimport atexit, runpy\n"
        script += f"def at_end():\n    {code}\natexit.register(at_end)\n"
        script += "runpy.run_path('train.py', run_name='__main__')"
        command = [sys.executable, "-c", script]
    return subprocess.run(
        command,
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | env,
    )


def load(name, *overrides):
    """The config that `--config configs/<name>` and overrides give."""
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    file, _, argument = name.partition(":")
    path = str(ROOT / "configs" / f"{file}.py") + (f":{argument}" if argument else "")
    argv = ["train.py", f"--config={path}", *overrides]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)  # ml_collections looks for overrides there
        values(argv)
    return holder.value


def test_digits_from_the_command_line_without_tensorflow(tmp_path):
    done = train(
        "--config=configs/digits.py:smoke",
        f"--workdir={tmp_path / 'run'}",
        code="print('TensorFlow:', 'tensorflow' in sys.modules)",
        # What it compiles goes to the user's folder.
        JAX_COMPILATION_CACHE_DIR="",
        XDG_CACHE_HOME=str(tmp_path / "cache"),
    )
    assert done.returncode == 0, done.stderr
    assert f"workdir  {tmp_path / 'run'}" in done.stdout
    assert "64 images to train on" in done.stdout
    assert "step 4/4  loss" in done.stdout
    assert "images/s" in done.stdout
    assert "step 4  test: top-1" in done.stdout
    assert "TensorFlow: False" in done.stdout
    params = mixer_jax.load_checkpoint(tmp_path / "run" / "final.npz")
    assert params["head"]["bias"].shape == (10,)
    compiled = (tmp_path / "cache" / "mixer_jax" / "compiled").glob("*-cache")
    assert {"jit_init_state", "jit_train_step", "jit_eval_step"} <= {
        path.name.split("-")[0] for path in compiled
    }


def test_fine_tuning_on_a_folder_from_a_published_layout_file(tmp_path):
    """b16.py with a small Mixer: ImageNet-21k head in the file, two classes here."""
    photos = write_folder(
        tmp_path / "photos",
        {"train/temple": 5, "train/flower": 6, "test/temple": 3, "test/flower": 2},
    )
    variant = Variant(Patches((32, 32)), 1, 16, 8, 16)
    sizes = mixer_jax.weights.layout.MixerSizes(variant, 49, 21843)
    model = sizes.create_model()
    import jax
    import jax.numpy as jnp

    images = jnp.zeros((1, 224, 224, 3))
    params = model.init(jax.random.key(0), images, train=False)["params"]
    (tmp_path / "weights").mkdir()
    mixer_jax.save_checkpoint(tmp_path / "weights" / "Mixer-B_16.npz", params)
    done = train(
        "--config=configs/b16.py",
        f"--workdir={tmp_path / 'run'}",
        f"--config.dataset={photos}",
        f"--config.pretrained_dir={tmp_path / 'weights'}",
        *SMALL,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "11 images to train on (train), 5 to test on (test), 2 classes" in done.stdout
    )
    assert "Mixer-B_16.npz, with a new head" in done.stdout
    assert "on 5 images" in done.stdout
    assert "top-5" not in done.stdout  # of two classes
    final = mixer_jax.load_checkpoint(tmp_path / "run" / "final.npz")
    assert final["head"]["kernel"].shape == (16, 2)
    names = json.loads((tmp_path / "run" / "class_names.json").read_text())
    assert names == ["flower", "temple"]


def test_tfds_dataset_without_tensorflow(tmp_path, tfds_dir):
    done = train(
        "--config=configs/b16.py:tiny_shapes",
        f"--workdir={tmp_path / 'run'}",
        f"--config.tfds_data_dir={tfds_dir}",
        "--config.pp.train=train[:75%]",
        "--config.pretrained_dir=",
        "--config.workers=1",  # the dataset is opened there too
        *SMALL,
        code="print('TensorFlow:', 'tensorflow' in sys.modules)",
    )
    assert done.returncode == 0, done.stderr
    assert "30 images to train on (train[:75%]), 14 to test on" in done.stdout
    assert "TensorFlow: False" in done.stdout


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.dataset=/no/where"], "DatasetError: There is no folder"),
        (["--config.base_lrs=1"], "no key 'base_lrs'. Did you mean base_lr?"),
        (["configs/b16.py"], "Not a flag: configs/b16.py"),
    ],
)
def test_mistakes_get_one_message_and_no_traceback(tmp_path, args, message):
    done = train("--config=configs/digits.py", f"--workdir={tmp_path / 'run'}", *args)
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert message in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("pretrained_dir=/no/where", "/no/where/digits.npz: no such file"),
        ("pretrained_dir=None", "from scratch: --config.pretrained_dir=''"),
        ("base_lr=-1", "base_lr is -1.0; expected a number, at least 0"),
    ],
)
def test_other_mistakes_in_a_config(tmp_path, monkeypatch, capsys, override, message):
    """Called here, as a process of its own would import JAX again."""
    import train as program

    config = load("digits", f"--config.{override}")
    values = {"_CONFIG": config, "_WORKDIR": str(tmp_path / "run")}
    values |= dict.fromkeys(("_COORDINATOR", "_NUM_PROCESSES", "_PROCESS_ID"))
    for name, value in values.items():
        monkeypatch.setattr(program, name, types.SimpleNamespace(value=value))
    monkeypatch.setattr(program, "keep_compiled_programs", lambda: None)
    alone = lambda *args: contextlib.nullcontext()  # JAX runs here already
    monkeypatch.setattr(program.processes, "initialize", alone)
    with pytest.raises(SystemExit) as ended:
        program.main(["train.py"])
    assert ended.value.code == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert "Traceback" not in printed


def tiny_run(workdir):
    """The command of a run of four steps, each of which prints a line."""
    return ["train.py", "--config=configs/digits.py:smoke", f"--workdir={workdir}"]


@pytest.mark.parametrize("redirection", ["", "2>&1"])
def test_run_goes_on_when_nobody_reads_its_output_any_more(tmp_path, redirection):
    command = shlex.join([sys.executable, "-W", "ignore", *tiny_run(tmp_path)])
    done = subprocess.run(
        ["bash", "-c", f"{command} {redirection} | head -2; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    *lines, status = done.stdout.splitlines()
    assert len(lines) == 2
    assert lines[0] == f"workdir  {tmp_path}"
    assert status == "0"
    assert done.stderr == ""
    assert (tmp_path / "final.npz").exists()
    log = (tmp_path / "train.log").read_text()
    assert "step 4/4" in log
    assert "step 4  test: top-1" in log
    assert "Done in" in log


def test_an_unexpected_error_is_one_line_here_and_a_traceback_in_the_log(tmp_path):
    """Such as a disk that is full, or an error of someone's own model."""
    script = (
        "import runpy, sys; from mixer_jax.evaluation import classification\n"
        "def evaluate(*args): raise RuntimeError('out of memory')\n"
        "classification.evaluate = evaluate\n"
        f"sys.argv = {tiny_run(tmp_path)!r}; sys.path.insert(0, '.')\n"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 1
    log = tmp_path / "train.log"
    assert done.stderr.splitlines() == [
        "RuntimeError: out of memory",
        f"The traceback is in {log}.",
    ]
    assert "ERROR RuntimeError: out of memory\nTraceback (most" in log.read_text()


SIGNALLED = """
import os, runpy, signal, sys, time
moment = sys.argv[1]
sys.argv[:2], sys.path[:0] = ["train.py"], ["."]

def leave(*args):
    os.kill(os.getpid(), signal.SIGTERM)

class Finder:
    def find_spec(self, name, *args):
        if name == "jax":
            leave()

if moment == "imports":
    sys.meta_path.insert(0, Finder())
elif moment == "twice in a save":
    from mixer_jax.training.checkpointing import Checkpoints
    def hang(self):
        first = signal.getsignal(signal.SIGTERM)
        leave()
        while signal.getsignal(signal.SIGTERM) is first:
            time.sleep(0.01)
        leave()
        time.sleep(1000)
    Checkpoints._add_manifest = hang
else:
    from mixer_jax.run import trainer
    original = getattr(trainer, moment)
    def call(*args, **kwargs):
        leave()
        return original(*args, **kwargs)
    setattr(trainer, moment, call)
runpy.run_path("train.py", run_name="__main__")
"""


@pytest.mark.parametrize(
    ("moment", "message"),
    [
        ("imports", "SIGTERM: ended at once."),
        ("open_data", "KeyboardInterrupt: SIGTERM before the first step. Nothing is"),
        ("write_result", "SIGTERM: stopping after this step"),
        ("twice in a save", "SIGTERM: ended at once."),
    ],
)
def test_status_of_a_run_that_a_signal_stops(tmp_path, moment, message):
    """75, for a script that then puts the run back into a queue; 0 if it was done."""
    _, *args = tiny_run(tmp_path)
    args += ["--config.workers=1"]  # its worker has this output open too, and must end
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SIGNALLED, moment, *args],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert done.returncode == (0 if moment == "write_result" else 75)
    assert (tmp_path / "final.npz").exists() == (moment == "write_result")
    assert (tmp_path / "run.lock").exists() == (moment == "twice in a save")


def test_workdir_is_named_after_the_config(tmp_path):
    for name in ("train.py", "configs", "mixer_jax"):
        (tmp_path / name).symlink_to(ROOT / name)
    done = train(
        "--config=configs/b32.py:/no/where", cwd=tmp_path, MIXER_JAX_CACHE=str(tmp_path)
    )
    assert f"workdir  {tmp_path}/runs/b32-_no_where\n" in done.stdout
    done = train("--config=configs/digits.py", "--config.dataset=/no", cwd=tmp_path)
    assert f"workdir  {tmp_path}/runs/digits\n" in done.stdout


@pytest.mark.slow
def test_digits_are_learned_as_well_in_bfloat16(tmp_path):
    top1 = {}
    for dtype in ("float32", "bfloat16"):
        workdir = tmp_path / dtype
        done = train(
            "--config=configs/digits.py",
            f"--config.model.dtype={dtype}",
            f"--workdir={workdir}",
            XLA_FLAGS="",  # fast programs: these are many steps
        )
        assert done.returncode == 0, done.stderr
        rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
        top1[dtype] = [row["test/top1"] for row in rows if "test/top1" in row][-1]
    assert top1["float32"] >= 0.975
    assert abs(top1["bfloat16"] - top1["float32"]) <= 0.005


# One of each kind in the plain run; the others differ from them in numbers alone.
SMOKE = ["digits", "pretrain_i1k"]
SLOW_SMOKE = [name for name in CONFIGS if name not in {*SMOKE, "common"}] + [
    "b16:cifar100",
    "l16:imagenet2012,448",
    "pretrain_i1k:l16",
    "pretrain_i21k:l16",
    "permutation:pixels",
]


def smoke(name):
    return f"{name}{',' if ':' in name else ':'}smoke"


@pytest.mark.parametrize(
    "name", SMOKE + [pytest.param(name, marks=pytest.mark.slow) for name in SLOW_SMOKE]
)
def test_every_config_runs_in_smoke_form(tmp_path, name):
    results = trainer.train_and_evaluate(load(smoke(name)), tmp_path)
    assert results["count"] == 64
    assert (tmp_path / "final.npz").exists()


@pytest.mark.parametrize("name", MODEL_CONFIGS)
def test_model_configs_are_their_variants(name):
    config = load(name)
    variant = VARIANTS[MODEL_CONFIGS[name]]
    assert config.model.patches.size == variant.patches.size
    assert config.model.num_blocks == variant.num_blocks
    assert config.model.hidden_dim == variant.hidden_dim
    assert config.model.tokens_mlp_dim == variant.tokens_mlp_dim
    assert config.model.channels_mlp_dim == variant.channels_mlp_dim


def test_a_model_config_at_another_size_of_images(tmp_path):
    """The paper's L/16 at 448 pixels, in the shapes that block_diagonal makes."""
    config = load("l16:imagenet2012,448")
    assert (config.dataset, config.total_steps) == ("imagenet2012", 20_000)
    assert (config.pp.crop, config.pp.resize) == (448, 512)
    assert (config.resolution, config.model.tokens_mlp_dim) == ("block_diagonal", 2048)
    config = load("b16:,288")
    assert (config.dataset, config.pp.crop, config.pp.resize) == ("cifar10", 288, 329)
    assert (config.resolution, config.model.tokens_mlp_dim) == ("interpolate", 384)
    config = load("b16:,320x224")
    assert (config.pp.crop, config.pp.resize) == ((320, 224), (366, 256))
    assert (config.resolution, config.model.tokens_mlp_dim) == ("interpolate", 384)
    config = load("b16:,448x224")
    assert (config.pp.crop, config.pp.resize) == ((448, 224), (512, 256))
    assert (config.resolution, config.model.tokens_mlp_dim) == ("block_diagonal", 768)
    assert load("b16:my_photos").resolution == "error"
    assert load("b16:1024").dataset == "1024"
    (tmp_path / "photos,448").mkdir()
    config = load(f"b16:{tmp_path}/photos,448")
    assert (config.dataset, config.pp.crop) == (f"{tmp_path}/photos,448", 224)


def test_b16_has_the_originals_hyper_parameters():
    config = load("b16")
    expected = {
        "dataset": "cifar10",
        "total_steps": 10_000,
        "batch": 512,
        "accum_steps": 8,
        "base_lr": 0.03,
        "warmup_steps": 500,
        "decay_type": "cosine",
        "grad_norm_clip": 1.0,
        "optim_dtype": "bfloat16",
        "optimizer": "sgd",
        "weight_decay": 0.0,
        "pretrained_dir": "imagenet21k",
    }
    assert {key: config[key] for key in expected} == expected
    assert config.pp.crop == 224
    assert config.model.model_name == "Mixer-B_16"


def test_dataset_argument_and_overrides():
    assert load("b16:cifar100").dataset == "cifar100"
    assert load("b16:imagenet2012").total_steps == 20_000
    assert load("b16:/some/folder").dataset == "/some/folder"
    config = load(
        "b16:oxford_flowers102",
        "--config.base_lr=1",
        "--config.model.num_blocks=4",
        "--config.pp.train=train[:10%]",
        "--config.tfds_data_dir=/data",
        "--config.pretrained_dir=",
    )
    assert config.base_lr == 1.0
    assert config.model.num_blocks == 4
    assert config.pp.train == "train[:10%]"
    assert config.tfds_data_dir == "/data"
    assert config.pretrained_dir == ""


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "common"])
def test_configs_are_locked_and_set_only_keys_of_common(name):
    config = load(name)
    assert config.is_locked
    assert config.model.is_locked
    with pytest.raises(AttributeError, match="base_lr"):
        config.base_lrs = 1
    known = set(common.get_config())
    assert set(config) <= known


def test_every_key_is_read():
    """A key that nothing reads is deleted."""
    package = ROOT / "mixer_jax"
    source = "\n".join(path.read_text() for path in package.rglob("*.py"))
    config = common.get_config()
    durations = {
        f"{name}_{unit}"
        for name in ("total", "warmup")
        for unit in ("steps", "epochs", "examples")  # read in one loop
    }
    keys = [f"config.{k}" for k in config if k not in ("pp", "model", "mesh")]
    keys = [key for key in keys if key.removeprefix("config.") not in durations]
    keys += [f"config.pp.{k}" for k in config.pp] + ["config.mesh.fsdp"]
    assert [key for key in keys if key not in source] == []
    unused = set(config.model) - set(mixer_jax.MlpMixer.__dataclass_fields__)
    assert not unused
