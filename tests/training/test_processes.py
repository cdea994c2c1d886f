"""One run on one device, on eight, and as two processes with four each."""

import concurrent.futures
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from mixer_jax.run import config as run_config
from mixer_jax.run import trainer
from mixer_jax.run.lock import locked
from mixer_jax.training import processes

from ..examples import write_folder
from ..run.test_trainer import final_params, tiny_config
from ..soak import free_address

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


def start_two(workdir, config, second_config=None):
    address = free_address()
    return [
        start(workdir, each, 4, f"--coordinator={address}",
              "--num_processes=2", f"--process_id={i}")
        for i, each in enumerate([config, second_config or config])
    ]  # fmt: skip


def finish(*runs, timeout=300):
    """Waits so many seconds, and returns what each process printed.

    On a busy machine all takes long. So tests look at what is printed, not at a clock.
    """
    deadline = time.monotonic() + timeout
    with concurrent.futures.ThreadPoolExecutor(len(runs)) as pool:
        outputs = [pool.submit(_read_all, run.stdout) for run in runs]
        try:
            for run in runs:
                run.wait(timeout=max(0, deadline - time.monotonic()))
        finally:
            for run in runs:
                run.kill()
        return [output.result() for output in outputs]


def _read_all(stream):
    # communicate() would lose what an earlier readline() left in its buffer.
    with stream:
        return stream.read()


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
        mixup_p=0.2,
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


@pytest.fixture(scope="module")
def of_two_processes(config, tmp_path_factory):
    """The workdir of a run, and what the second process printed."""
    workdir = tmp_path_factory.mktemp("two")
    first, second = finish(*start_two(workdir, config))
    assert "Done" in first, first + second
    return workdir, second


def test_two_processes_train_as_one_does_and_write_everything_once(
    of_two_processes, on_one_device
):
    workdir, second = of_two_processes
    assert_same_run(workdir, on_one_device)
    log = (workdir / "train.log").read_text()
    assert log.count("step 20  test") == log.count("Done in") == 1
    assert "on 8 x cpu" in log
    assert "step" not in second
    assert len(list((workdir / "tensorboard").iterdir())) == 1
    assert len(rows(workdir)) == 22


def test_two_processes_stop_at_the_same_step_and_go_on(config, tmp_path):
    config = config.copy_and_resolve_references()
    # Most of the time is spent in evaluations, which are not waited for.
    config.update(total_steps=100_000, eval_every=1, checkpoint_every=100_000)
    stopped_at = [0]
    for attempt in range(2):
        runs = start_two(tmp_path, config)
        deadline = time.monotonic() + 600
        while len(train_losses(tmp_path)) < stopped_at[-1] + 3:
            assert time.monotonic() < deadline, finish(*runs, timeout=1)
            assert runs[0].poll() is None, finish(*runs)
            time.sleep(0.1)
        runs[1 - attempt].send_signal(signal.SIGTERM)  # not the one that writes, first
        outputs = finish(*runs)
        stopped_at.append(max(int(p.name) for p in tmp_path.glob("checkpoints/*")))
        for run, output in zip(runs, outputs, strict=True):
            assert run.returncode == 75
            message = (
                f"RunStopped: Stopped at step {stopped_at[-1]} of 100000 by SIGTERM"
            )
            assert message in output
    first, second = stopped_at[1:]
    assert second > first
    assert list(train_losses(tmp_path)) == list(range(1, second + 1))
    assert f"from the checkpoint of step {first}" in outputs[0]


@pytest.mark.slow
@pytest.mark.parametrize("manifest", [True, False])
def test_two_processes_go_on_from_the_same_whole_checkpoint(
    config, of_two_processes, tmp_path, manifest
):
    whole, _ = of_two_processes
    workdir = shutil.copytree(whole, tmp_path / "damaged")
    folder = workdir / "checkpoints"
    if manifest:
        part = next((folder / "20" / "default" / "ocdbt.process_0" / "d").iterdir())
        part.write_bytes(bytes(part.stat().st_size))
    else:  # as in an older run
        for path in folder.glob("*/manifest.json"):
            path.unlink()
        (folder / "20" / "default" / "manifest.ocdbt").unlink()
    (workdir / "final.npz").unlink()
    first, second = finish(*start_two(workdir, config))
    assert "Traceback" not in first + second
    assert first.count("is now 20.damaged") == 1
    assert "20.damaged" not in second
    assert "from the checkpoint of step 10" in first
    assert {x.name for x in folder.iterdir()} == {"10", "20", "20.damaged"}
    jax.tree.map(
        np.testing.assert_array_equal,
        final_params(workdir),
        final_params(whole),
    )
    assert train_losses(workdir) == train_losses(whole)


@pytest.mark.slow
def test_two_processes_are_refused_where_another_run_writes(config, tmp_path):
    with locked(tmp_path):
        runs = start_two(tmp_path, config)
        first, second = finish(*runs)
        assert [p.name for p in tmp_path.iterdir()] == ["run.lock"]
    message = f"WorkdirInUseError: {tmp_path} is in use by process {os.getpid()} on "
    assert message in first
    assert f"ProcessError: Process 0 ended with {message}" in second
    assert [run.returncode for run in runs] == [1, 1]


def test_both_processes_end_soon_when_one_fails(config, tmp_path):
    photos = write_folder(
        tmp_path / "photos", {"train/a": 20, "train/b": 1, "test/a": 20}
    )
    configs = [config.copy_and_resolve_references() for _ in range(2)]
    for one in configs:
        one.dataset = str(photos)
    configs[1].dataset = str(tmp_path / "none")
    first, second = finish(*start_two(tmp_path / "run", *configs))
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


@pytest.mark.parametrize("answers", [0, 1])
def test_a_folder_is_left_clean_when_another_process_fails(
    tmp_path, monkeypatch, answers
):
    found = []

    class Failing:
        index = 0

        def collect(self, name, value, senders=None):
            found.append(len(list(tmp_path.iterdir())))
            if len(found) > answers:
                raise processes.ProcessError("Process 1 ended")
            return [value]

    monkeypatch.setattr(processes, "_watch", Failing())
    with pytest.raises(processes.ProcessError, match="Process 1 ended"):
        processes.check_shared(tmp_path)
    assert found == [1] * (answers + 1)
    assert not list(tmp_path.iterdir())


def test_the_processes_of_a_host_are_counted_and_asked_once(monkeypatch):
    class Third:
        index, asked = 2, 0

        def collect(self, name, value):
            self.asked += 1
            return ["host 1", "host 2", value, value]

    monkeypatch.setattr(processes, "_watch", None)
    assert processes.count_on_host() == 1
    watch = Third()
    monkeypatch.setattr(processes, "_watch", watch)
    assert [processes.count_on_host(), processes.count_on_host()] == [2, 2]
    assert watch.asked == 1


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
    outputs = finish(start_in_cluster(variables), start_in_cluster(others))
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
    (output,) = finish(start_in_cluster(environment))
    assert output == "0 of 1, False\n"


def test_a_shell_that_srun_opened_is_a_run_of_one_process():
    (output,) = finish(start_in_cluster(slurm(0, 1)))
    assert "0 of 1, True" in output


def test_hosts_that_cannot_be_reached_get_a_message(monkeypatch):
    def initialize(**kwargs):
        raise KeyError("OMPI_COMM_WORLD_SIZE")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(processes.ProcessError, match="To run on this one alone"):
        processes.initialize()
