"""Kills one run again and again, and compares its result with an undisturbed run.

    python tests/soak.py --kills 100
    python tests/soak.py --kills 20 --processes 2 --seed 1

The run trains on digits with every augmentation on. At random moments the program sends
SIGKILL or SIGTERM to it, and damages files of its work directory; then it starts the
same command again, until the run is done. Parameters, optimizer state and metrics.jsonl
must be those of a run that nobody disturbed, bit for bit. The exit status is 0 if so.

Of the signals, a third come at a random moment of the start. The others wait until the
run has done a random number of its steps, and then for a random part of a save or an
evaluation. So each step is as likely as any other, and the last ones are near the end.
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import numpy as np
import orbax.checkpoint as ocp

ROOT = pathlib.Path(__file__).parents[1]

EVERY = 25  # steps between two checkpoints
LEAVE_SECS = 300.0  # within which a process ends after SIGTERM
RUN_SECS = 3600.0  # within which the undisturbed run ends

# What a run ends with if a signal stopped it: as asked, or before it handles signals.
STOPPED = {75, -signal.SIGTERM}

CONFIG = {
    "total_steps": 1000,
    "warmup_steps": 2,
    "checkpoint_every": EVERY,
    "eval_every": 2 * EVERY,
    "progress_every": 3,  # no divisor: rows of means cross a checkpoint
    "batch": 16,
    "batch_eval": 64,
    "mixup_p": 0.2,
    "label_smoothing": 0.1,
    "pp.randaugment": (2, 10.0),
    "pp.flip": True,
    "model.num_blocks": 2,
    "model.hidden_dim": 16,
    "model.tokens_mlp_dim": 8,
    "model.channels_mlp_dim": 16,
    "model.stoch_depth": 0.2,
    "model.dropout_rate": 0.1,
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What befalls a run.

    Attributes:
      kills: how many SIGKILLs, each of one process.
      terms: how many SIGTERMs.
      damages: how many times a file is damaged.
      processes: of the run.
      steps: of the run.
      seed: of all that is random.
    """

    kills: int
    terms: int
    damages: int
    processes: int
    steps: int
    seed: int


class Run:
    """The processes of one start of train.py, with all that they print in a file."""

    def __init__(self, workdir: pathlib.Path, plan: Plan):
        self.workdir, self.start = workdir, time.monotonic()
        self.first_row_secs = 0.0
        self.output = workdir.with_suffix(".txt")
        flags = [f"--config.{k}={v}" for k, v in CONFIG.items() if k != "total_steps"]
        command = [
            *(sys.executable, "-W", "ignore", "train.py", "--config=configs/digits.py"),
            *(f"--workdir={workdir}", f"--config.total_steps={plan.steps}", *flags),
        ]
        others = [
            f"--coordinator={free_address()}",
            f"--num_processes={plan.processes}",
        ]
        with self.output.open("w") as output:
            self.processes = [
                subprocess.Popen(
                    [*command, *others, f"--process_id={i}"]
                    if plan.processes > 1
                    else command,
                    cwd=ROOT,
                    env=os.environ
                    | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                )
                for i in range(plan.processes)
            ]

    def secs(self) -> float:
        return time.monotonic() - self.start

    def step(self) -> int:
        """Returns the step of the last row that this start has written."""
        with contextlib.suppress(OSError, IndexError, ValueError):
            path = self.workdir / "metrics.jsonl"
            if path.stat().st_mtime > time.time() - self.secs():
                step = json.loads(path.read_text().splitlines()[-1])["step"]
                self.first_row_secs = self.first_row_secs or self.secs()
                return step
        return -1

    def ended(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def wait(self, secs: float) -> list[int]:
        """Waits for all processes; after `secs` kills those that are still there."""
        deadline = time.monotonic() + secs
        for process in self.processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0, deadline - time.monotonic()))
        for process in self.processes:
            process.kill()
        return [process.wait() for process in self.processes]


def free_address() -> str:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return f"localhost:{free.getsockname()[1]}"


def soak(folder: pathlib.Path, plan: Plan) -> collections.Counter[str]:
    """Runs the undisturbed run and the other one in `folder`, and compares them.

    Returns:
      how often what happened.

    Raises:
      AssertionError: they differ, or a process ended otherwise than promised.
    """
    assert plan.steps >= 2 * EVERY or not plan.damages, "no other checkpoint to take"
    whole = Run(folder / "whole", plan)
    while whole.step() < 0 and not whole.ended():
        time.sleep(0.05)
    _finish(whole)
    start_secs = whole.first_row_secs
    print(
        f"undisturbed: {whole.secs():.0f} s, of which {start_secs:.1f} s to start",
        flush=True,
    )

    rng, counts = random.Random(plan.seed), collections.Counter[str]()
    signals = [signal.SIGKILL] * plan.kills + [signal.SIGTERM] * plan.terms
    rng.shuffle(signals)
    damage_after = set(rng.sample(range(len(signals)), plan.damages))
    workdir, i = folder / "disturbed", 0
    while i < len(signals):
        run, number = Run(workdir, plan), signals[i]
        left = len(signals) - i
        during = _wait_for_moment(run, rng, left, start_secs, plan.steps)
        while i in damage_after and not (_checkpoints(workdir)[1:] or run.ended()):
            time.sleep(0.01)  # else no damage could be made good
        if run.step() < 0:
            during = "starting"
        else:
            start_secs = (
                run.first_row_secs or start_secs
            )  # as programs are compiled now
            if any(workdir.glob("checkpoints/*-tmp")):
                during = "saving"
        if run.ended():  # before that moment, so this start does not count
            _finish(run)
            continue
        victim = rng.choice(run.processes)
        victim.send_signal(number)
        secs = run.secs()
        # The others of several processes notice; a scheduler may not wait for that.
        patience = LEAVE_SECS if number == signal.SIGTERM else rng.uniform(0, 5)
        statuses = run.wait(patience)
        status = statuses[run.processes.index(victim)]
        if number == signal.SIGKILL and status == 0:  # it ended before the signal
            continue
        counts[f"{number.name} {during}"] += 1
        _check(run, number, status)
        if i in damage_after:
            counts[f"damaged {_damage(workdir, rng)}"] += 1
        print(
            f"{i + 1}/{len(signals)}: {number.name} after {secs:.1f} s, {during}, "
            f"step {run.step()}, status {statuses}",
            flush=True,
        )
        i += 1
    _finish(Run(workdir, plan))
    assert not list(workdir.rglob("*.partial")), "something half-written stayed"
    compare(folder / "whole", workdir)
    return counts


def _wait_for_moment(
    run: Run, rng: random.Random, left: int, start_secs: float, steps: int
) -> str:
    """Waits for a moment for the next of `left` signals; returns what it is in."""
    if rng.random() < 1 / 3:
        until = run.start + rng.uniform(0, start_secs)
        while time.monotonic() < until and run.step() < 0 and not run.ended():
            time.sleep(0.01)
        return "starting"
    done = max((int(x.name) for x in _checkpoints(run.workdir)), default=0)
    target = done + rng.uniform(0, 2 * (steps - done) / left)
    deadline = time.monotonic() + RUN_SECS
    while run.step() < min(target, steps) and not run.ended():
        assert time.monotonic() < deadline, run.output.read_text()
        time.sleep(0.005)
    time.sleep(rng.uniform(0, 1.0 if target > steps - EVERY else 0.3))
    return "at the end" if run.step() >= steps else "in steps or evaluating"


def _finish(run: Run) -> None:
    statuses = run.wait(RUN_SECS)
    assert set(statuses) == {0}, f"{statuses}\n{run.output.read_text()}"


def _check(run: Run, number: signal.Signals, status: int) -> None:
    """Raises AssertionError if the process that got a signal ended in a wrong way."""
    output = run.output.read_text()
    assert "Traceback" not in output, output
    if number == signal.SIGTERM:
        assert status in {*STOPPED, 0}, f"{status}\n{output}"
    else:
        assert status == -number, f"{status}\n{output}"


def _checkpoints(workdir: pathlib.Path) -> list[pathlib.Path]:
    return [x for x in workdir.glob("checkpoints/*") if x.name.isdecimal()]


def _damage(workdir: pathlib.Path, rng: random.Random) -> str:
    """Damages a file of the newest checkpoint, or final.npz; returns how."""
    newest = max(_checkpoints(workdir), key=lambda x: int(x.name))
    files = [x for x in sorted(newest.rglob("*")) if x.is_file()]
    files += [x for x in [workdir / "final.npz"] if x.exists()]
    file = rng.choice(files)
    data = bytearray(file.read_bytes())
    how = rng.choice(["zeroed", "cut", "removed", "one bit flipped"])
    if how == "removed" or not data:
        file.unlink()
        return how
    if how == "zeroed":
        data[:] = bytes(len(data))
    elif how == "cut":
        del data[len(data) // 2 :]
    else:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    file.write_bytes(data)
    return how


def compare(expected: pathlib.Path, found: pathlib.Path) -> None:
    """Raises AssertionError if two runs differ in more than names and times."""
    for what, read in READERS.items():
        one, other = dict(read(expected)), dict(read(found))
        assert one, f"{what}: there is nothing to compare"
        assert list(one) == list(other), f"{what}: {list(one)}, and {list(other)}"
        differing = [key for key in one if one[key] != other[key]]
        assert not differing, f"{what}: {differing} differ"


def _parameters(workdir: pathlib.Path) -> Iterator[tuple[str, object]]:
    with np.load(workdir / "final.npz") as file:
        yield from ((key, _bits(file[key])) for key in file.files)


def _state(workdir: pathlib.Path) -> Iterator[tuple[str, object]]:
    """Gives parameters, optimizer state and step of the newest checkpoint."""
    import jax

    newest = max(_checkpoints(workdir), key=lambda x: int(x.name))
    handler = ocp.PyTreeCheckpointHandler()
    tree = handler.metadata(newest / "default").tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(np.ndarray), tree)
    args = ocp.args.PyTreeRestore(tree, as_numpy)
    state = handler.restore(newest / "default", args=args)
    yield "step", newest.name
    for path, value in jax.tree_util.tree_leaves_with_path(state):
        yield jax.tree_util.keystr(path), _bits(np.asarray(value))


def _rows(workdir: pathlib.Path) -> Iterator[tuple[str, object]]:
    """Gives the rows of metrics.jsonl, without how fast the steps were."""
    for i, line in enumerate((workdir / "metrics.jsonl").read_text().splitlines()):
        row = json.loads(line)
        row.pop("train/images_per_sec", None)
        yield f"line {i + 1}, step {row['step']}", json.dumps(row)


def _bits(array: np.ndarray) -> tuple[str, tuple[int, ...], bytes]:
    return str(array.dtype), array.shape, array.tobytes()


READERS = {"parameters": _parameters, "state": _state, "metrics": _rows}


def main() -> None:
    """Reads the flags, and says what happened."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20, help="SIGKILLs")
    parser.add_argument("--terms", type=int, default=0, help="SIGTERMs")
    parser.add_argument("--damages", type=int, default=0, help="files to damage")
    parser.add_argument("--processes", type=int, default=1, help="of the run")
    parser.add_argument("--steps", type=int, default=1000, help="of the run")
    parser.add_argument("--seed", type=int, default=0, help="of all that is random")
    plan = Plan(**vars(parser.parse_args()))
    start = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak") as folder:
        os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{folder}/compiled")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(2**30))
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
        counts = soak(pathlib.Path(folder), plan)
    for what, count in sorted(counts.items()):
        print(f"{count:5}  {what}")
    print(
        "Parameters, optimizer state and metrics.jsonl are equal bit for bit, after "
        f"{plan.kills + plan.terms} signals in {time.monotonic() - start:.0f} s."
    )


if __name__ == "__main__":
    main()
