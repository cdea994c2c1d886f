"""train.py on a small disk of its own that fills up in the middle of a run."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from .. import soak

ROOT = pathlib.Path(__file__).parents[2]

# A namespace of its own lets anybody mount a tmpfs, where the system allows that.
MOUNTS = ["unshare", "--user", "--map-root-user", "--mount"]

# $OUT is a folder of the real disk, and $DISK one for the small disk. Functions get the
# workdir; train.py's output and exit status go to files of the given name.
SCRIPT = """
mount -t tmpfs -o size=1m none "$DISK" || exit 1
train() {
  processes=()
  for i in $(seq 0 $((PROCESSES - 1))); do
    "${TRAIN[@]}" --workdir="$1" --coordinator=$3 --process_id=$i \\
      --num_processes=$PROCESSES >"$OUT/$2.$i.out" 2>"$OUT/$2.$i.err" &
    processes+=($!)
  done
  for i in "${!processes[@]}"; do
    wait ${processes[i]}; echo $? >"$OUT/$2.$i.status"
  done
}
TRAIN=("$@")
train "$DISK/run" full $ADDRESS0
ls "$DISK/run/checkpoints" >"$OUT/checkpoints"
if [ "$AGAIN" ]; then
  mount -o remount,size=64m "$DISK"
  train "$DISK/run" again $ADDRESS1
  cp -r "$DISK/run" "$OUT/run"
  train "$OUT/whole" whole $ADDRESS2
fi
"""


def run_on_small_disk(out, processes, again):
    """Runs SCRIPT; returns the status and what is printed to stderr, by process."""
    disk = out / "disk"
    disk.mkdir()
    try_it = [*MOUNTS, "mount", "-t", "tmpfs", "none", str(disk)]
    if shutil.which("unshare") is None or subprocess.run(try_it).returncode:
        pytest.skip("This system lets nobody but root mount a disk.")
    keys = soak.CONFIG | {
        "total_steps": 60,
        "checkpoint_every": 5,
        "keep_checkpoints": 100,
        "progress_every": 1,
    }
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    addresses = {f"ADDRESS{i}": soak.free_address() for i in range(3)}
    subprocess.run(
        [*MOUNTS, "bash", "-c", SCRIPT, "bash", sys.executable, "-W", "ignore",
         "train.py", "--config=configs/digits.py", *flags],
        cwd=ROOT,
        env=os.environ
        | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        | {"DISK": str(disk), "OUT": str(out)}
        | addresses
        | {"PROCESSES": str(processes), "AGAIN": "yes" if again else ""},
        timeout=1800,
        check=True,
    )  # fmt: skip

    def read(name, what):
        files = [out / f"{name}.{i}.{what}" for i in range(processes)]
        return [file.read_text() for file in files]

    return {
        name: (read(name, "status"), read(name, "err"))
        for name in ("full", "again", "whole")[: 3 if again else 1]
    }


DISK_ERROR = re.compile(
    r"(?m)^DiskError: \S+/disk/run/[\w.]+ cannot be written: No space left on device\. "
    r"Make room on that disk; then give the same command again\.\n"
)


@pytest.mark.slow
def test_a_full_disk_is_one_message_and_the_run_goes_on_once_there_is_room(tmp_path):
    found = run_on_small_disk(tmp_path, 1, again=True)
    (status,), (printed,) = found["full"]
    assert status == "1\n"
    # If the log meets the full disk before anything else does, it says so, once.
    *before, error = printed.splitlines(keepends=True)
    assert DISK_ERROR.fullmatch(error), printed
    assert len(before) <= 1, printed
    assert all(re.match(r"warning: .*/train\.log cannot be", x) for x in before), (
        printed
    )
    saved = (tmp_path / "checkpoints").read_text().split()
    newest = max(int(name) for name in saved if name.isdecimal())
    assert 5 <= newest < 60
    assert found["again"][0] == found["whole"][0] == ["0\n"], found
    log = (tmp_path / "again.0.out").read_text()
    assert f"start    from the checkpoint of step {newest}\n" in log
    soak.compare(tmp_path / "whole", tmp_path / "run")


@pytest.mark.slow
def test_a_full_disk_ends_both_processes(tmp_path):
    found = run_on_small_disk(tmp_path, 2, again=False)
    statuses, printed = found["full"]
    assert "0\n" not in statuses, printed
    assert any(DISK_ERROR.search(text) for text in printed), printed
    assert not any("Traceback" in text for text in printed), printed
