"""One run on one device, on eight, and as two processes with four each."""

import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mixer_jax.run import config as run_config
from mixer_jax.run import trainer
from mixer_jax.training import processes

from ..examples import write_folder
from ..run.test_trainer import final_params, tiny_config

ROOT = pathlib.Path(__file__).parents[2]


def start(workdir, config, devices, *args, program="train.py", env=()):
    """Starts train.py with the config's values, on CPU devices."""
    flat = run_config.flatten(json.loads(config.to_json()))
    values = [f"--config.{k}={v}" for k, v in flat.items() if v is not None]
    values = [v.replace("[", "(").replace("]", ")") for v in values]
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", program, "--config=configs/digits.py",
         f"--workdir={workdir}", *values, *args],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(devices)}
        | dict(env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )  # fmt: skip


def free_address():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def start_two(workdir, config, second_config=None):
    address = free_address()
    return [
        start(workdir, each, 4, f"--coordinator={address}",
              "--num_processes=2", f"--process_id={i}")
        for i, each in enumerate([config, second_config or config])
    ]  # fmt: skip


def finish(*runs, timeout=300):
    """Waits so many seconds, and returns what each process printed."""
    try:
        return [run.communicate(timeout=timeout)[0] for run in runs]
    finally:
        for run in runs:
            run.kill()


def rows(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def train_losses(workdir):
    if not (workdir / "metrics.jsonl").exists():
        return {}
    return {r["step"]: r["train/loss"] for r in rows(workdir) if "train/loss" in r}


@pytest.fixture(scope="module")
def config():
    # Not Adam: some biases have a gradient of 0 but for rounding, which it magnifies.
    return tiny_config(
        total_steps=20,
        eval_every=10,
        checkpoint_every=10,
        optimizer="sgd",
        optim_dtype="float32",
        base_lr=0.1,
        weight_decay=0.0,
    )


@pytest.fixture(scope="module")
def on_one_device(config, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("one")
    (output,) = finish(start(workdir, config, 1))
    assert "on 1 x cpu" in output
    return workdir


def assert_same_run(workdir, expected):
    found, want = train_losses(workdir), train_losses(expected)
    assert list(found) == list(want) == list(range(1, 21))
    for step, loss in want.items():
        assert abs(found[step] - loss) < 1e-5, step
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=0),
        final_params(workdir),
        final_params(expected),
    )
    tests = [[r for r in rows(w) if "test/top1" in r] for w in (workdir, expected)]
    for a, b in zip(*tests, strict=True):
        assert (a["step"], a["test/count"]) == (
            b["step"],
            b["test/count"] == 364 and 364,
        )
        assert a["test/loss"] == pytest.approx(b["test/loss"], abs=1e-5)


@pytest.mark.parametrize("fsdp", [1, 4])
def test_eight_devices_train_as_one_does(
    config, on_one_device, tmp_path, fsdp, monkeypatch
):
    monkeypatch.setattr("mixer_jax.training.sharding.MIN_SPLIT_SIZE", 64)
    config = config.copy_and_resolve_references()
    config.mesh.fsdp = fsdp
    trainer.train_and_evaluate(config, tmp_path)
    assert_same_run(tmp_path, on_one_device)


def test_two_processes_train_as_one_does_and_write_everything_once(
    config, on_one_device, tmp_path
):
    first, second = finish(*start_two(tmp_path, config))
    assert "Done" in first, first + second
    assert_same_run(tmp_path, on_one_device)
    log = (tmp_path / "train.log").read_text()
    assert log.count("step 20  test") == log.count("Done in") == 1
    assert "on 8 x cpu" in log
    assert "step" not in second
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    assert len(rows(tmp_path)) == 22


def test_two_processes_stop_at_the_same_step_and_go_on(config, tmp_path):
    config = config.copy_and_resolve_references()
    config.update(total_steps=100_000, eval_every=100_000, checkpoint_every=100_000)
    stopped_at = [0]
    for attempt in range(2):
        runs = start_two(tmp_path, config)
        deadline = time.monotonic() + 200
        while len(train_losses(tmp_path)) < stopped_at[-1] + 3:
            assert time.monotonic() < deadline, finish(*runs, timeout=1)
            assert runs[0].poll() is None, finish(*runs)
            time.sleep(0.1)
        runs[1 - attempt].send_signal(signal.SIGTERM)  # not the one that writes, first
        outputs = finish(*runs)
        stopped_at.append(max(int(p.name) for p in tmp_path.glob("checkpoints/*")))
        for run, output in zip(runs, outputs, strict=True):
            assert run.returncode == 1
            assert f"RunStopped: Stopped at step {stopped_at[-1]} of 100000" in output
    first, second = stopped_at[1:]
    assert second > first
    assert list(train_losses(tmp_path)) == list(range(1, second + 1))
    assert f"from the checkpoint of step {first}" in outputs[0]


def test_both_processes_end_soon_when_one_fails(config, tmp_path):
    photos = write_folder(
        tmp_path / "photos", {"train/a": 20, "train/b": 1, "test/a": 20}
    )
    configs = [config.copy_and_resolve_references() for _ in range(2)]
    for one in configs:
        one.dataset = str(photos)
    configs[1].dataset = str(tmp_path / "none")
    first, second = finish(*start_two(tmp_path / "run", *configs), timeout=120)
    assert "Process 1 ended with DatasetError: There is no folder" in first, first
    assert "There is no folder" in second, first + second


def start_two_of(code, *args, ids=(0, 1)):
    """Starts code in two processes with two devices each."""
    address = free_address()
    return [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, address, str(i), *args],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for i in ids
    ]  # fmt: skip


def run_two(code, *args):
    """Runs code in two processes with two devices each; returns what they print."""
    return finish(*start_two_of(code, *args))


OWN_FOLDERS = """
import pathlib, sys
from mixer_jax.training import processes
processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
processes.SHARED_FOLDER_SECS = 1
processes.check_shared(pathlib.Path(sys.argv[3]))
print("shared")
folder = pathlib.Path(sys.argv[3], sys.argv[2])
folder.mkdir()
processes.check_shared(folder)
"""


def test_a_folder_for_each_process_is_refused(tmp_path):
    for output in run_two(OWN_FOLDERS, str(tmp_path)):
        assert "shared\n" in output
        assert "is not the same folder for all processes" in output
        assert "process 1 does not see" in output
    assert not list(tmp_path.glob("**/*.shared"))


DIFFERENT = """
import importlib.metadata, json, pathlib, sys
import jax, numpy as np
from configs import digits
from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.fingerprint import fingerprint
from mixer_jax.run.config import comparable, flatten
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
def test_every_kind_of_difference_ends_both_processes_of_a_run(config, tmp_path):
    """Prints a table of the kinds; see it with -s."""
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
        outputs = finish(*runs, timeout=60)
        secs = time.monotonic() - begin
        for run, output in zip(runs, outputs, strict=True):
            assert run.returncode == 1, output
            assert "ProcessError: " in output, output
            assert text in output, output
        (line, *_) = (x for x in outputs[0].splitlines() if text in x)
        print(f"| {text} | {secs:.0f} s | {line} |")


def test_runs_that_differ_end_at_once(config, tmp_path):
    """Before they were compared, other total_steps let both wait for ever."""
    other = config.copy_and_resolve_references()
    other.update(base_lr=0.01, total_steps=21)
    runs = start_two(tmp_path / "run", config, other)
    for run, output in zip(runs, finish(*runs, timeout=60), strict=True):
        assert run.returncode == 1
        assert "base_lr: 0.1 in process 0; 0.01 in process 1" in output
        assert "total_steps: 20 in process 0; 21 in process 1" in output
    assert not (tmp_path / "run").exists()


def test_a_signal_ends_a_process_that_connects(config, tmp_path):
    runs = {}
    for i, name in enumerate(["SIGTERM", "SIGINT"]):  # one is first, the other is not
        address = free_address()
        runs[name] = start(tmp_path, config, 4, f"--coordinator={address}",
                           "--num_processes=2", f"--process_id={i}")  # fmt: skip
    for name, run in runs.items():
        assert "connecting to the others" in run.stdout.readline()
        time.sleep(1)
        run.send_signal(signal.Signals[name])
    outputs = finish(*runs.values(), timeout=10)
    for output, (name, run) in zip(outputs, runs.items(), strict=True):
        assert run.returncode == 1
        assert f"KeyboardInterrupt: {name} while connecting the 2 processes" in output


WAITING = """
import sys, time
from mixer_jax.training import processes, watch
address, index, where, lost_secs = sys.argv[1:]
watch.LOST_SECS = float(lost_secs)

def prepare():
    if index == "0":
        time.sleep(200)

try:
    with processes.initialize(address, 2, int(index)):
        if where == "turn":
            print("ready", flush=True)
            processes.first_process_first(prepare)
        import numpy as np
        from jax.experimental import multihost_utils
        with processes.stop_signals() as stop_requested:
            for step in range(100_000):
                if stop_requested(step):
                    sys.exit(f"stopped at {step}")
                multihost_utils.process_allgather(np.int32(step))
                if step == 2 and where == "long step":
                    time.sleep(200)
                if step == 1:
                    print("ready", flush=True)
                time.sleep(0.01)
except (processes.ProcessError, KeyboardInterrupt) as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


def start_waiting(where, lost_secs=60):
    runs = start_two_of(WAITING, where, str(lost_secs))
    for run in runs:
        while run.stdout.readline() != "ready\n":
            assert run.poll() is None
    time.sleep(1)
    return runs


def test_a_signal_ends_a_process_that_waits_for_the_first_ones_turn():
    first, second = start_waiting("turn")
    second.send_signal(signal.SIGTERM)
    (output,) = finish(second, timeout=10)
    assert output == (
        "KeyboardInterrupt: SIGTERM while waiting for process 0 to finish prepare. "
        "Nothing is lost.\n"
    )
    (output,) = finish(first, timeout=20)
    assert output.startswith("ProcessError: Process 1 ended with KeyboardInterrupt: ")
    assert first.returncode == second.returncode == 1


@pytest.mark.parametrize(
    ("suspended", "number"),
    [
        (0, signal.SIGTERM),
        (1, None),
        pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
        pytest.param(0, None, marks=pytest.mark.slow),
    ],
)
def test_a_process_that_waits_in_a_step_for_one_that_is_suspended(suspended, number):
    runs = start_waiting("steps", lost_secs=60 if number else 4)
    waiting = runs[1 - suspended]
    runs[suspended].send_signal(signal.SIGSTOP)
    try:
        time.sleep(0.5)
        if number:
            waiting.send_signal(number)
        (output,) = finish(waiting, timeout=10 if number else 30)
    finally:
        runs[suspended].kill()
        finish(*runs)
    assert waiting.returncode == 1
    if number:
        assert "A signal asked this run to stop while in step" in output
        assert "another process did not answer" in output
    else:
        assert f"Nothing was heard of process {suspended} for 4 s, while" in output


def test_a_signal_to_one_process_stops_all_at_the_same_step():
    runs = start_waiting("steps")
    runs[1].send_signal(signal.SIGINT)
    first, second = finish(*runs, timeout=10)
    assert first.splitlines()[-1] == second.splitlines()[-1]
    assert "stopped at" in first


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_the_step():
    first, second = start_waiting("long step")
    first.send_signal(signal.SIGTERM)
    time.sleep(9)  # longer than processes have to answer
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    outputs = finish(first, second, timeout=20)
    assert (
        outputs[0] == "KeyboardInterrupt: SIGTERM while in step 3. Nothing was saved.\n"
    )
    assert outputs[1].startswith("ProcessError: Process 0 ended with KeyboardInterrupt")


@pytest.mark.slow
def test_one_process_is_told_that_another_was_killed():
    first, second = start_waiting("steps")
    second.kill()
    output, _ = finish(first, second, timeout=60)
    assert "ProcessError: JAX failed in step" in output
    assert "If another process has ended, see its message" in output


INTERLEAVED = """
import sys
import jax, numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh
from mixer_jax.training import processes, sharding
processes.initialize(sys.argv[1], 2, int(sys.argv[2]))
devices = np.array(jax.devices())[[0, 2, 1, 3]].reshape(4, 1)
mesh = Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))
rows = sharding.local_rows(mesh, 8)
batch = sharding.shard_batch(mesh, {"label": np.array(rows)})
print(rows, multihost_utils.process_allgather(batch["label"], tiled=True))
"""


def test_rows_of_processes_whose_devices_are_no_neighbours():
    """As on a pod, where the mesh follows the wires."""
    first, second = run_two(INTERLEAVED)
    assert "[0, 1, 4, 5] [0 1 2 3 4 5 6 7]" in first, first
    assert "[2, 3, 6, 7] [0 1 2 3 4 5 6 7]" in second, second


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"coordinator": "localhost:1"}, "Give all three"),
        ({"coordinator": "localhost:1", "num_processes": 2, "process_id": 2}, "to 1"),
        (
            {"coordinator": "localhost", "num_processes": 2, "process_id": 0},
            "host:port",
        ),
    ],
)
def test_what_does_not_connect_processes(given, message):
    with pytest.raises(processes.ProcessError, match=message):
        processes.initialize(**given)


def test_environment_names_the_processes(monkeypatch):
    calls = []
    record = lambda **kwargs: calls.append(kwargs)
    monkeypatch.setattr(jax.distributed, "initialize", record)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.2:8476")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    processes.initialize()
    names = ("coordinator_address", "num_processes", "process_id")
    assert [calls[0][name] for name in names] == ["10.0.0.2:8476", 4, 3]
    assert calls[0]["coordinator_bind_address"] is None
    processes.initialize("localhost:8476", 2, 0)
    assert calls[1]["coordinator_bind_address"] == "localhost:8476"


IN_CLUSTER = """
import os, sys
from mixer_jax.training import processes
os.environ.update(zip(sys.argv[1::2], sys.argv[2::2]))
processes.initialize()
import jax
index, count = jax.process_index(), jax.process_count()
print(f"{index} of {count}, {jax.distributed.is_initialized()}")
"""


def start_in_cluster(environment):
    """Starts a process that finds out by itself whether it is one of several."""
    return subprocess.Popen(
        [sys.executable, "-c", IN_CLUSTER, *(x for kv in environment for x in kv)],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def slurm(process, processes):
    port = free_address().rpartition(":")[2]
    names = ("JOB_ID", "STEP_NODELIST", "NTASKS", "PROCID", "LOCALID")
    values = ("1", "localhost", str(processes), str(process), str(process))
    variables = [(f"SLURM_{k}", v) for k, v in zip(names, values, strict=True)]
    return [*variables, ("JAX_COORDINATOR_PORT", port)]


def test_processes_that_srun_started_find_each_other():
    variables = slurm(0, 2)
    others = [(k, "1" if k in ("SLURM_PROCID", "SLURM_LOCALID") else v)
              for k, v in variables]  # fmt: skip
    outputs = finish(start_in_cluster(variables), start_in_cluster(others), timeout=60)
    for i, output in enumerate(outputs):
        assert f"{i} of 2, True" in output


@pytest.mark.parametrize(
    "environment",
    [
        [],
        [("SLURM_JOB_ID", "1"), ("SLURM_NTASKS", "4")],  # a shell that salloc opened
        [("KUBERNETES_SERVICE_HOST", "10.0.0.1")],  # any pod
    ],
)
def test_one_process_alone_waits_for_nobody(environment):
    (output,) = finish(start_in_cluster(environment), timeout=60)
    assert output == "0 of 1, False\n"


def test_a_shell_that_srun_opened_is_a_run_of_one_process():
    (output,) = finish(start_in_cluster(slurm(0, 1)), timeout=60)
    assert "0 of 1, True" in output


def test_hosts_that_cannot_be_reached_get_a_message(monkeypatch):
    def initialize(**kwargs):
        raise KeyError("OMPI_COMM_WORLD_SIZE")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(processes.ProcessError, match="To run on this one alone"):
        processes.initialize()
