"""Waits for another process end: on a signal, and when that one fails or is lost."""

import signal
import time

import pytest

from ..run.test_trainer import tiny_config
from ..soak import free_address
from .test_processes import finish, start, start_two_of


def test_a_signal_ends_a_process_that_connects(tmp_path):
    config, runs = tiny_config(), {}
    for i, name in enumerate(["SIGTERM", "SIGINT"]):  # one is first, the other is not
        address = free_address()
        runs[name] = start(tmp_path, config, 4, f"--coordinator={address}",
                           "--num_processes=2", f"--process_id={i}")  # fmt: skip
    for run in runs.values():
        assert "connecting to the others" in run.stdout.readline()
    time.sleep(3)  # from here to where they wait is a moment
    for name, run in runs.items():
        run.send_signal(signal.Signals[name])
    outputs = finish(*runs.values())
    for output, (name, run) in zip(outputs, runs.items(), strict=True):
        assert run.returncode == 75
        assert f"KeyboardInterrupt: {name} while connecting the 2 processes" in output


WAITING = """
import math, sys, threading, time
from mixer_jax.training import processes, stopping, watch
address, index, where, lost_secs, answer_secs = sys.argv[1:]
stopping.ANSWER_SECS = float(answer_secs)

def prepare():
    if index == "0":
        print("ready", flush=True)
        time.sleep(600)

def wait_until_waiting():
    while not processes.current().doing.startswith("waiting"):
        time.sleep(0.05)
    print("ready", flush=True)

try:
    with processes.initialize(address, 2, int(index)):
        if where == "turn":
            if index == "1":
                threading.Thread(target=wait_until_waiting, daemon=True).start()
            processes.first_process_first(prepare)
        import numpy as np
        from jax.experimental import multihost_utils
        deadline = 0 if (where, index) == ("limit", "1") else math.inf
        with processes.stop_requests(deadline) as stop_requested:
            for step in range(100_000):
                if reason := stop_requested(step):
                    sys.exit(f"stopped at {step} by {reason}")
                multihost_utils.process_allgather(np.int32(step))
                if step == 2:
                    watch.LOST_SECS = float(lost_secs)  # not before: starts are slow
                    print("ready", flush=True)
                    if where == "long step":
                        time.sleep(600)
                time.sleep(0.01)
except (processes.ProcessError, KeyboardInterrupt) as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(processes.exit_status(error))
"""


def start_waiting(where, lost_secs=60, answer_secs=60):
    runs = start_two_of(WAITING, where, str(lost_secs), str(answer_secs))
    for run in runs:
        while run.stdout.readline() != "ready\n":
            assert run.poll() is None
    return runs


def test_a_signal_ends_a_process_that_waits_for_the_first_ones_turn():
    first, second = start_waiting("turn")
    second.send_signal(signal.SIGTERM)
    (output,) = finish(second)
    assert output == (
        "KeyboardInterrupt: SIGTERM while waiting for process 0 to finish prepare. "
        "Nothing is lost.\n"
    )
    (output,) = finish(first)
    assert output.startswith("ProcessError: Process 1 ended with KeyboardInterrupt: ")
    assert (first.returncode, second.returncode) == (1, 75)


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
    runs = start_waiting("steps", lost_secs=60 if number else 4, answer_secs=6)
    waiting = runs[1 - suspended]
    runs[suspended].send_signal(signal.SIGSTOP)
    try:
        time.sleep(0.5)
        if number:
            waiting.send_signal(number)
        (output,) = finish(waiting)
    finally:
        runs[suspended].kill()
        finish(runs[suspended])
    assert waiting.returncode == (75 if number else 1)
    if number:
        assert "This run was asked to stop while in step" in output
        assert f"process {suspended} did not answer" in output
    else:
        assert f"Nothing was heard of process {suspended} for 4 s, while" in output


def test_a_signal_to_one_process_stops_all_at_the_same_step():
    runs = start_waiting("steps")
    runs[1].send_signal(signal.SIGINT)
    first, second = finish(*runs)
    assert first.splitlines()[-1] == second.splitlines()[-1]
    assert "stopped at" in first


def test_a_deadline_of_one_process_stops_all_at_the_same_step():
    first, second = finish(*start_two_of(WAITING, "limit", "60", "60"))
    assert first.splitlines()[-1] == second.splitlines()[-1]
    assert "by max_run_secs" in first


@pytest.mark.slow
def test_a_second_signal_does_not_wait_for_the_step():
    first, second = start_waiting("long step", answer_secs=20)
    first.send_signal(signal.SIGTERM)
    time.sleep(22)  # longer than processes have to answer
    assert first.poll() is None
    first.send_signal(signal.SIGTERM)
    outputs = finish(first, second)
    assert (first.returncode, second.returncode) == (75, 1)
    assert (
        outputs[0] == "KeyboardInterrupt: SIGTERM while in step 3. Nothing was saved.\n"
    )
    assert outputs[1].startswith("ProcessError: Process 0 ended with KeyboardInterrupt")


@pytest.mark.slow
def test_one_process_is_told_that_another_was_killed():
    first, second = start_waiting("steps")
    second.kill()
    output, _ = finish(first, second)
    assert "ProcessError: JAX failed in step" in output
    assert "If another process has ended, see its message" in output


ENDING = """
import sys, time
from mixer_jax.training import processes, stopping, watch
address, index, what = sys.argv[1:]
watch.POLL_SECS, stopping.ANSWER_SECS = 0.2, 8.0
if what == "complete":  # nothing fails, so these do not end a process
    watch.FAIL_SECS = watch.SHUTDOWN_SECS = 1.0

def run(total_steps, close_secs=0):
    with processes.stop_requests() as stop_requested:
        for step in range(total_steps):
            if stop_requested(step):
                print("saves", flush=True)
                time.sleep(close_secs)
                raise processes.RunStopped(step, total_steps, "here", "a signal")
            time.sleep(0.01)
            if step == 2:
                print("ready", flush=True)

try:
    with processes.initialize(address, 2, int(index)):
        if what in ("stop", "again"):
            try:
                run(100_000, close_secs=10 * (what == "stop" and index == "1"))
            except processes.RunStopped as stopped:
                if what != "again":
                    raise
                print(stopped)
        if what != "stop":
            run(300)
    print("computes")
    if what == "fail" and index == "0":
        raise ValueError("after the run")
    time.sleep(3 * (index == "0"))
    print("done")
except (processes.ProcessError, processes.RunStopped, KeyboardInterrupt) as error:
    print(f"{type(error).__name__}: {error}")
    sys.exit(processes.exit_status(error))
"""


def read_until(run, line):
    while run.stdout.readline() != f"{line}\n":
        assert run.poll() is None


@pytest.mark.parametrize("late", [None, 0, 1])
def test_a_run_that_stops_may_close_slowly_and_get_its_signal_late(late):
    """As when processes are killed one after the other."""
    runs = start_two_of(ENDING, "stop")
    for run in runs:
        read_until(run, "ready")
    runs[1 if late == 0 else 0].send_signal(signal.SIGTERM)
    for run in runs:
        read_until(run, "saves")
    if late is not None:
        time.sleep(1)
        runs[late].send_signal(signal.SIGTERM)
    for run, output in zip(runs, finish(*runs), strict=True):
        assert output.startswith("RunStopped: Stopped at step "), output
        assert len(output.splitlines()) == 1, output
        assert run.returncode == 75


def test_a_program_computes_on_after_its_run():
    runs = start_two_of(ENDING, "complete")
    for run, output in zip(runs, finish(*runs), strict=True):
        assert output.endswith("ready\ncomputes\ndone\n"), output
        assert run.returncode == 0


def test_a_second_run_in_a_program_does_not_stop_as_the_first_did():
    runs = start_two_of(ENDING, "again")
    for run in runs:
        read_until(run, "ready")
    runs[1].send_signal(signal.SIGTERM)
    for run, output in zip(runs, finish(*runs), strict=True):
        assert "Stopped at step" in output
        assert output.endswith("ready\ncomputes\ndone\n"), output
        assert run.returncode == 0


def test_an_error_after_the_run_is_told_at_the_end():
    runs = start_two_of(ENDING, "fail")
    first, second = finish(*runs)
    assert runs[0].returncode == 1
    assert "ValueError: after the run" in first
    assert "Process 0 ended with ValueError: after the run" in second
