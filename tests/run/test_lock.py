"""The lock of a work directory: of one run at a time, and of none that is dead."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from mixer_jax.run import lock, trainer

from .test_trainer import tiny_config

HOLD = """
import os, pathlib, sys, time
from mixer_jax.run.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    child = 1
    if "fork" in sys.argv:
        heard, told = os.pipe()
        child = os.fork()
        if child:
            os.read(heard, 1)  # it has done what it does after a fork
        else:
            os.write(told, b"1")
    if child:
        print("held", child, flush=True)
    time.sleep(300)
"""


@pytest.fixture
def hold():
    """Starts a process that holds a folder's lock; returns it and its child's id."""
    started = []

    def start(workdir, *args):
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", HOLD, str(workdir), *args],
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        word, child = process.stdout.readline().split()
        assert word == "held"
        return process, int(child)

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_second_run_is_refused_and_told_who_holds_it(tmp_path, hold):
    process, _ = hold(tmp_path)
    text = (tmp_path / "run.lock").read_text()
    said = json.loads(text)
    with pytest.raises(trainer.WorkdirInUseError) as error:
        trainer.train_and_evaluate(tiny_config(), tmp_path)
    who = f"process {process.pid} on {said['host']}, since {said['since']}"
    assert str(error.value) == (
        f"{tmp_path} is in use by {who}. Nothing was changed there. Wait until that "
        "run ends, or stop it; or take another --workdir."
    )
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {"run.lock": text}


@pytest.mark.parametrize("args", [[], ["fork"]])
def test_a_lock_of_a_killed_process_is_free_at_once(tmp_path, hold, args):
    """Also if a child of it lives on."""
    process, child = hold(tmp_path, *args)
    try:
        process.kill()
        process.wait()
        assert (tmp_path / "run.lock").exists()
        with lock.locked(tmp_path):
            said = json.loads((tmp_path / "run.lock").read_text())
            assert said["pid"] == os.getpid()
        assert not (tmp_path / "run.lock").exists()
    finally:
        if args:
            os.kill(child, signal.SIGKILL)


def test_runs_of_one_process_lock_each_other_out_and_follow_each_other(tmp_path):
    with (
        lock.locked(tmp_path),
        pytest.raises(trainer.WorkdirInUseError),
        lock.locked(tmp_path),
    ):
        raise AssertionError
    with pytest.raises(KeyboardInterrupt), lock.locked(tmp_path):
        raise KeyboardInterrupt
    with lock.locked(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_a_lock_is_renewed(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "RENEW_SECS", 0.05)
    with lock.locked(tmp_path):
        path = tmp_path / "run.lock"
        os.utime(path, (0, 0))
        deadline = time.monotonic() + 60
        while path.stat().st_mtime == 0:
            assert time.monotonic() < deadline
            time.sleep(0.05)


@pytest.mark.parametrize(
    "content", [b"", b"\0" * 90, b"[" * 5000, b'{"pid": 1}', b"[]"]
)
def test_a_lock_that_a_crash_left_damaged_is_free(tmp_path, monkeypatch, content):
    monkeypatch.setattr(lock, "_WRITE_SECS", 0.2)
    (tmp_path / "run.lock").write_bytes(content)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("there", [True, False])
def test_a_lock_is_not_written_through_a_link(tmp_path, there):
    workdir, target = tmp_path / "run", tmp_path / "target"
    workdir.mkdir()
    (workdir / "run.lock").symlink_to(target)
    if there:
        target.write_text("mine")
    with pytest.raises(OSError, match=r"run\.lock"), lock.locked(workdir):
        raise AssertionError
    assert target.exists() == there
    assert not there or target.read_text() == "mine"


class OtherMachine:
    """A lock that a process of another machine holds, on a disk that both see."""

    def __init__(self, path, monkeypatch, os_lock):
        holder = lock._Holder("other", "node7", 42, "yesterday", "token")
        path.write_text(json.dumps(holder._asdict()))
        self.file = path.open()
        if os_lock == "kept":  # as a server of NFS does, which nobody tells of a crash
            fcntl.flock(self.file, fcntl.LOCK_EX)
        if os_lock == "unsupported":

            def flock(file, how):
                raise OSError(95, "Operation not supported")

            monkeypatch.setattr(fcntl, "flock", flock)
        self.path, self.ended = path, threading.Event()

    def beat(self):
        while not self.ended.wait(0.3):
            os.utime(self.path)


@pytest.fixture(params=["without effect", "kept", "unsupported"])
def other_machine(tmp_path, monkeypatch, request):
    other = OtherMachine(tmp_path / "run.lock", monkeypatch, request.param)
    yield other
    other.file.close()


def test_another_machine_that_lives_keeps_its_lock(tmp_path, other_machine):
    thread = threading.Thread(target=other_machine.beat)
    thread.start()
    try:
        with (
            pytest.raises(trainer.WorkdirInUseError, match="42 on node7, since yest"),
            lock.locked(tmp_path),
        ):
            raise AssertionError
    finally:
        other_machine.ended.set()
        thread.join()
    assert json.loads((tmp_path / "run.lock").read_text())["host"] == "node7"


def test_the_lock_of_a_machine_that_is_gone_is_taken_over(
    tmp_path, other_machine, monkeypatch, caplog
):
    monkeypatch.setattr(lock, "DEAD_SECS", 0.3)
    monkeypatch.setattr(lock, "_REPLACE_SECS", 0.0)
    with lock.locked(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert "locked by process 42 on node7, since yesterday" in caplog.text
    assert not (tmp_path / "run.lock").exists()
