"""What processes of a run must have in common: each kind of difference is named."""

import json
import shutil
import threading
import time

import pytest

from mixer_jax.training import agreement
from mixer_jax.training.processes import ProcessError
from mixer_jax.weights.timm import save_timm

from ..examples import write_folder
from ..run.test_trainer import tiny_config
from ..soak import free_address
from .test_processes import (
    ROOT,
    finish,
    run_two,
    start,
    start_two,
)

DIFFERENT = """
import importlib.metadata, json, pathlib, sys
import jax, numpy as np
from configs import digits
from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.fingerprint import fingerprint
from mixer_jax.run.config import flatten
from mixer_jax.run.paths import comparable
from mixer_jax.training import agreement, processes, sharding
address, index, folder = sys.argv[1:]
second, folder = index == "1", pathlib.Path(folder)
processes.initialize(address, 2, int(index))

def case(name, check, values):
    try:
        check(*values)
        print(f"## {name}: equal")
    except processes.ProcessError as error:
        print(f"## {name}: {error}")

def check_config(key="", value=None):
    config = digits.get_config()
    if second and key:
        config.update_from_flattened_dict({key: value})
    agreement.check_processes(comparable(config))

def check_data(first, other):
    data = open_dataset(str(folder / (other if second else first)))
    agreement.check_same("the dataset", flatten(fingerprint(data)))

def check_arrays(dtype, step):
    tree = {"params": {"head": jax.ShapeDtypeStruct((2, 3), dtype)}}
    values = {"step": step, **agreement.describe_arrays(tree)}
    agreement.check_same("model, optimizer and step", values)

case("nothing", check_config, ())
case("own folders", check_config, ("tfds_data_dir", "/elsewhere"))
case("own dataset", check_config, ("dataset", "/elsewhere"))
for key, value in json.loads((folder / "config.json").read_text()).items():
    case(key, check_config, (key, value))
for name in ("photos", "copy", "more", "swapped", "renamed"):
    case(name, check_data, ("photos", name))
case("labels", check_data, ("table.csv", "other.csv"))
mesh = sharding.create_mesh()
rows = np.zeros((2, 3)) + second
head = jax.make_array_from_callback((2, 3), sharding.replicated(mesh), rows.__getitem__)
split = sharding.shard_batch(mesh, {"label": np.arange(2) + second})
for name, tree in (("copies", {"head": head}), ("parts", split)):
    case(name, agreement.check_same_copies, ("the parameters", tree))
case("dtype", check_arrays, ("bfloat16" if second else "float32", 0))
case("step", check_arrays, ("float32", 30 if second else 20))
original = importlib.metadata.version
if second:
    version = lambda name: "0.0.1" if name == "optax" else original(name)
    importlib.metadata.version = version
case("version", check_config, ())
importlib.metadata.version = original
module = agreement.__file__
if second:
    agreement.__file__ = str(folder / "mixer_jax" / "training" / "agreement.py")
case("code", check_config, ())
agreement.__file__ = module
jax.config.update("jax_enable_x64", second)
case("x64", check_config, ())
jax.config.update("jax_enable_x64", False)
case("in the end", check_config, ())
"""

DATASETS = ("more", "swapped", "renamed", "labels")
CONFIG_DIFFERENCES = {
    "base_lr": (0.5, "0.003 in process 0; 0.5 in process 1"),
    "batch": (32, "64 in process 0; 32 in process 1"),
    "seed": (7, "0 in process 0; 7 in process 1"),
    "total_steps": (9, "9 in process 1"),
    "model.num_blocks": (2, "2 in process 1"),
    "pp.crop": (8, "8 in process 1"),
    "loss": ("sigmoid", '"sigmoid" in process 1'),
}


def edit_copy(folder):
    """Copies the package, and adds a line to model.py."""
    shutil.copytree(ROOT / "mixer_jax", folder / "mixer_jax")
    with (folder / "mixer_jax" / "model.py").open("a") as file:
        file.write("# a fork\n")


def write_variants(folder):
    """Writes a dataset, its copy, and three that differ a little."""
    counts = {"train/a": 4, "train/b": 4, "test/a": 2, "test/b": 2}
    write_folder(folder / "photos", counts)
    for name in ("copy", "more", "swapped", "renamed"):
        shutil.copytree(folder / "photos", folder / name)
    image = next((folder / "more" / "train" / "a").iterdir())
    shutil.copy(image, image.with_stem("another"))
    for split in ("train", "test"):
        (folder / "renamed" / split / "b").rename(folder / "renamed" / split / "c")
    for image in (folder / "swapped" / "train" / "a").iterdir():
        other = folder / "swapped" / "train" / "b" / image.name
        contents = image.read_bytes() + b"0"
        image.write_bytes(other.read_bytes() if other.exists() else contents)
    paths = sorted((folder / "photos").rglob("*/*/*.*"))
    for name, classes in (("table", "ab"), ("other", "ba")):
        rows = [
            f"{path.relative_to(folder)},{classes[i % 2]},{path.parts[-3]}"
            for i, path in enumerate(paths)
        ]
        text = "\n".join(["path,label,split", *rows, ""])
        (folder / f"{name}.csv").write_text(text)


def test_each_kind_of_difference_is_named_in_both_processes(tmp_path):
    edit_copy(tmp_path)
    write_variants(tmp_path)
    values = {key: value for key, (value, _) in CONFIG_DIFFERENCES.items()}
    (tmp_path / "config.json").write_text(json.dumps(values))
    expected = {key: f"{key}: " for key in values} | {
        "more": "splits.train.count: 8 in process 0; 9 in process 1",
        "swapped": "splits.train.sizes: ",
        "renamed": "classes.names: ",
        "labels": "splits.train.labels: ",
        "copies": "head: ",
        "dtype": "params/head: ",
        "step": "step: 20 in process 0; 30 in process 1",
        "version": "optax: ",
        "code": "mixer_jax/model.py: ",
        "x64": 'jax_enable_x64: "False" in process 0; "True" in process 1',
    }
    for output in run_two(DIFFERENT, str(tmp_path)):
        _, *parts = output.split("## ")
        found = dict(part.split(": ", 1) for part in parts)
        for name in (
            "nothing",
            "own folders",
            "own dataset",
            "photos",
            "copy",
            "parts",
        ):
            assert found.pop(name) == "equal\n", output
        assert found.pop("in the end").startswith("equal"), output
        assert list(found) == list(expected), output
        for name, text in expected.items():
            assert f"  {text}" in found[name], output
            assert len(found[name].splitlines()) == 3 or name in DATASETS, found[name]
        for key, (_, text) in CONFIG_DIFFERENCES.items():
            assert text in found[key], found[key]


class Exchange:
    """What connects processes, here threads; keeps what they send."""

    def __init__(self, count):
        self.sent = [[] for _ in range(count)]
        self._barrier = threading.Barrier(count)
        self._thread = threading.local()

    def run(self, index, fn):
        self._thread.index = index
        return fn()

    def collect(self, name, value, senders=None):
        self.sent[self._thread.index].append(value)
        self._barrier.wait()
        values = [sent[-1] for sent in self.sent]
        self._barrier.wait()
        return values if senders is None else [values[i] for i in senders]


def differences(monkeypatch, values):
    """Compares values of several processes: their messages, and the longest value."""
    exchange, messages = Exchange(len(values)), [""] * len(values)
    monkeypatch.setattr(agreement, "current", lambda: exchange)

    def compare(index):
        with pytest.raises(ProcessError) as raised:
            exchange.run(index, lambda: agreement.check_same("it", values[index]))
        messages[index] = str(raised.value)

    threads = [
        threading.Thread(target=compare, args=[i], daemon=True)
        for i in range(len(values))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    return messages, max(len(answer) for _, answer in exchange.sent)


def test_many_differences_are_sent_and_shown_in_part(monkeypatch):
    """As when process 0 alone has other parameters."""
    values = [{f"key{i:03}": index > 0 for i in range(500)} for index in range(3)]
    messages, longest = differences(monkeypatch, values)
    assert longest < 1000
    assert len(set(messages)) == 1
    lines = messages[0].splitlines()[1:-1]
    assert lines[0] == "  key000: false in process 0; true in processes 1, 2"
    assert lines[19].startswith("  key019: ")
    assert lines[20:] == ["  and at least 480 more"]


def test_processes_that_differ_in_other_keys(monkeypatch):
    first = {f"key{i:03}": 0 for i in range(60)}
    second = first | {f"key{i:03}": 1 for i in range(30, 60)}
    third = first | {f"key{i:03}": 2 for i in range(15, 55)}
    messages, _ = differences(monkeypatch, [first, second, third])
    lines = messages[0].splitlines()[1:-1]
    assert lines[0] == "  key015: 0 in processes 0, 1; 2 in process 2"
    assert lines[19] == "  key034: 0 in process 0; 1 in process 1; 2 in process 2"


def write_program(path, *lines):
    """Writes a train.py that does something first."""
    path.write_text("\n".join([*lines, (ROOT / "train.py").read_text()]))
    return path


def kinds_of_difference(folder):
    """Returns what is different in the second process, by the text that names it.

    These are values of the config; or "program", "env", "devices" or "workdir".
    """
    edit_copy(folder)
    write_variants(folder)
    copy = write_program(folder / "train.py")
    other_version = write_program(
        folder / "version.py",
        "import importlib.metadata as metadata",
        "version = metadata.version",
        "metadata.version = lambda x: '0.0.1' if x == 'flax' else version(x)",
    )
    (folder / "own").mkdir()
    return {
        "base_lr": {"base_lr": 0.01},
        "batch": {"batch": 32},
        "seed": {"seed": 1},
        "total_steps": {"total_steps": 21},
        "model.num_blocks": {"model.num_blocks": 1},
        "splits.train.count": {"dataset": str(folder / "more")},
        "splits.train.sizes": {"dataset": str(folder / "swapped")},
        "splits.train.labels": {"dataset": str(folder / "other.csv")},
        "classes.names": {"dataset": str(folder / "renamed")},
        "mixer_jax/model.py": {"program": copy, "env": {"PYTHONPATH": str(ROOT)}},
        "  flax: ": {"program": other_version, "env": {"PYTHONPATH": str(ROOT)}},
        "is not the same folder": {"workdir": folder / "own"},
        "jax_enable_x64": {"env": {"JAX_ENABLE_X64": "1"}},
        "devices: 4 in process 0; 2 in process 1": {"devices": 2},
        "XLA_FLAGS": {"env": {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true"}},
    }


@pytest.mark.slow
def test_every_kind_of_difference_ends_both_processes_of_a_run(tmp_path):
    """Prints a table of the kinds; see it with -s."""
    config = tiny_config(total_steps=20)
    for number, (text, different) in enumerate(kinds_of_difference(tmp_path).items()):
        runs, address, begin = [], free_address(), time.monotonic()
        for i in range(2):
            values = {}
            if "dataset" in different:
                name = "table.csv" if "labels" in text else "photos"
                values["dataset"] = str(tmp_path / name)
            values |= different if i else {}
            how = {k: values.pop(k) for k in ("program", "env") if k in values}
            workdir = values.pop("workdir", tmp_path / f"run{number}")
            devices = values.pop("devices", 4)
            changed = config.copy_and_resolve_references()
            changed.update_from_flattened_dict(values)
            runs.append(
                start(workdir, changed, devices, f"--coordinator={address}",
                      "--num_processes=2", f"--process_id={i}", **how)
            )  # fmt: skip
        outputs = finish(*runs)
        secs = time.monotonic() - begin
        for run, output in zip(runs, outputs, strict=True):
            assert run.returncode == 1, output
            assert "ProcessError: " in output, output
            assert text in output, output
        (line, *_) = (x for x in outputs[0].splitlines() if text in x)
        print(f"| {text} | {secs:.0f} s | {line} |")


def test_runs_that_differ_end_at_once(tmp_path):
    """Before they were compared, other total_steps let both wait for ever."""
    config = tiny_config(base_lr=0.1, total_steps=20)
    other = config.copy_and_resolve_references()
    other.update(base_lr=0.01, total_steps=21)
    runs = start_two(tmp_path / "run", config, other)
    for run, output in zip(runs, finish(*runs), strict=True):
        assert run.returncode == 1
        assert "base_lr: 0.1 in process 0; 0.01 in process 1" in output
        assert "total_steps: 20 in process 0; 21 in process 1" in output
    assert not (tmp_path / "run").exists()


def test_files_that_say_something_else_on_each_host(tmp_path, loaded):
    """Their parameters are the same, and so are the configs."""
    runs, address = [], free_address()
    for i, gelu in enumerate(("erf", "tanh")):
        file = tmp_path / gelu / "a.safetensors"
        save_timm(file, loaded.params, gelu)
        config = tiny_config(pretrained_dir=str(file))
        where = (f"--coordinator={address}", "--num_processes=2", f"--process_id={i}")
        runs.append(start(tmp_path / "run", config, 4, *where))
    for run, output in zip(runs, finish(*runs), strict=True):
        assert run.returncode == 1
        assert "differ in what the parameters to start from say:" in output
        assert 'model.gelu: "erf" in process 0; "tanh" in process 1' in output
    assert not (tmp_path / "run").exists()
