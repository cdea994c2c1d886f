"""The numbers of a run, also on a disk that refuses what is written."""

import errno
import json
import types

import jax
import pytest
from tensorboardX.event_file_writer import EventsWriter

from mixer_jax.files import DiskError
from mixer_jax.training.metrics import MetricsWriter, NonFiniteError, Reporter


@pytest.fixture
def full():
    """A file of which no buffer reaches the disk."""
    file = open("/dev/full", "wb")  # noqa: SIM115 - what is buffered fails on closing
    yield file
    with pytest.raises(OSError, match="No space left"):
        file.close()


class NearlyFull:
    """A file with room for half a row."""

    def __init__(self, file):
        self.file, self.has_room = file, True

    def write(self, row):
        if not self.has_room:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.has_room = False
        return self.file.write(row[: len(row) // 2])

    def close(self):
        self.file.close()


def rows(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def write(workdir, start_step, steps):
    writer = MetricsWriter(workdir, start_step, enabled=True)
    for step in steps:
        writer.write(step, {"train/loss": 1 / step})
    return writer


def test_a_row_that_does_not_fit_ends_the_run_and_is_written_again(tmp_path):
    writer = write(tmp_path, 0, [1, 2, 3])
    writer._file = NearlyFull(writer._file)
    with pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written: No space"):
        writer.write(4, {"train/loss": 1 / 4})
    writer.close()
    assert not (tmp_path / "metrics.jsonl").read_text().endswith("\n")  # cut off
    write(tmp_path, 2, [3, 4]).close()
    assert rows(tmp_path) == [{"step": i, "train/loss": 1 / i} for i in (1, 2, 3, 4)]


def test_tensorboards_files_on_a_full_disk_end_the_run(tmp_path, full):
    writer = write(tmp_path, 0, [1])
    records = writer._events._py_recordio_writer
    records._writer.close()
    records._writer = full
    many = {f"train/{i}": 1.0 for i in range(2000)}  # more than is buffered
    with pytest.raises(DiskError, match="tensorboard cannot be written: No space"):
        writer.write(2, many)
    with pytest.raises(DiskError, match="tensorboard cannot be written: No space"):
        writer.close()


@pytest.mark.parametrize("replaced", [False, True])
def test_a_metrics_file_that_is_gone_ends_the_run(tmp_path, replaced):
    writer = write(tmp_path, 0, [1])
    (tmp_path / "metrics.jsonl").rename(tmp_path / "moved.jsonl")
    if replaced:
        (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(DiskError, match=r"metrics\.jsonl cannot be written: No such"):
        writer.write(2, {"train/loss": 1.0})
    writer.close()


def test_tensorboard_hides_the_rows_that_are_written_again(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(EventsWriter, "write_event", lambda self, x: events.append(x))
    write(tmp_path, 5, [6]).close()
    starts = [x.step for x in events if x.HasField("session_log")]
    assert starts == [6]
    (value,) = events[-1].summary.value
    assert (events[-1].step, value.tag) == (6, "train/loss")


@pytest.mark.parametrize("index", [0, 1])
def test_one_process_logs_what_is_skipped_and_all_stop(
    tmp_path, monkeypatch, caplog, index
):
    monkeypatch.setattr(jax, "process_index", lambda: index)
    checkpoints = types.SimpleNamespace(latest_step=int, latest_numbers=dict)
    lengths = {"total_steps": 9, "batch": 1, "num_examples": 1, "every": 9}
    bad = {"loss": float("nan"), "grad_norm": 1.0, "skipped": 1}
    with Reporter(tmp_path, checkpoints, **lengths, nonfinite_limit=2) as reporter:
        reporter.push(1, bad)
        reporter.push(2, bad)
        reporter.to_disk()
        with pytest.raises(NonFiniteError, match="2 steps in a row"):
            reporter.flush()
    assert [x[:6] for x in caplog.messages] == (["step 1"] if index == 0 else [])
    assert (tmp_path / "metrics.jsonl").exists() == (index == 0)
