import contextlib
import itertools
import logging
import os
import pathlib
import signal
import subprocess
import sys
import threading

import grain
import numpy as np
import pytest

from mixer_jax.data import pipeline, workers
from mixer_jax.data.dataset import DatasetError, Example, open_dataset
from mixer_jax.data.permute import create_permute
from mixer_jax.data.preprocess import EvalTransform, TrainTransform
from mixer_jax.data.workers import Workers, log_again, usual_workers

from ..examples import write_mixed_folder


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Good and damaged images of all formats; a file is missing. And its path."""
    root = tmp_path_factory.mktemp("images")
    write_mixed_folder(root, 60, 12)
    source = open_dataset(str(root)).split("train")
    missing = str(source.images[5])
    pathlib.Path(missing).unlink()
    return source, missing


TRAIN = TrainTransform(
    (16, 24), randaugment=(2, 15), permute=create_permute("patches", (8, 8))
)


def read(split, training, count):
    """Batches that `count` workers prepare, and the warnings."""
    source, missing = split
    given = {"batch_size": 16, "rows": [1, 2, 5, 9, 15], "missing": {missing}}
    given |= {"num_classes": len(set(source.labels)), "workers": count}
    if training:
        batches = pipeline.train_batches(source, TRAIN, seed=7, start_step=3, **given)
    else:
        batches = pipeline.eval_batches(
            source, EvalTransform(16, "torchvision", 20, "float32"), **given
        )
    with contextlib.closing(batches):
        return list(itertools.islice(batches, 12))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "count",
    [
        2,
        pytest.param(1, marks=pytest.mark.slow),
        pytest.param(4, marks=pytest.mark.slow),
    ],
)
def test_batches_and_warnings_are_those_of_threads(split, caplog, training, count):
    def told():
        texts = [record.getMessage().split(" (")[0] for record in caplog.records]
        caplog.clear()
        assert len(texts) == len(set(texts))
        return sorted(texts)

    expected, expected_told = read(split, training, 0), told()
    found, found_told = read(split, training, count), told()
    assert len(found) == len(expected) > 2
    for x, y in zip(found, expected, strict=True):
        assert list(x) == list(y)
        for key in x:
            assert x[key].dtype == y[key].dtype
            np.testing.assert_array_equal(x[key], y[key])
    assert found_told
    assert training or found_told == expected_told  # training reads ahead


def test_errors_are_those_of_threads(split):
    source, _ = split

    def error(count):
        with pytest.raises(DatasetError) as caught:
            read((source, "none"), training=False, count=count)
        return str(caught.value)

    assert error(2) == error(0)


def test_what_is_said_once_is_said_once(caplog):
    """Each worker says it, as it cannot know of the others."""

    class Frames:
        def __len__(self):
            return 64

        def __getitem__(self, i):
            from mixer_jax.data.decode import say_once

            say_once("frames of this test", f"image {i} has 2 frames")
            logging.getLogger("another").warning("image %d", i)
            return Example(np.zeros((4, 4, 3), np.uint8), 0, f"image {i}")

    batches = pipeline.eval_batches(
        Frames(), EvalTransform(4), batch_size=64, workers=2
    )
    with contextlib.closing(batches):
        next(batches)
    assert caplog.text.count("has 2 frames (said once)") == 1
    others = [r.getMessage() for r in caplog.records if r.name == "another"]
    assert sorted(others) == sorted(f"image {i}" for i in range(64))


def test_a_worker_knows_no_jax_ignores_signals_and_its_death_is_an_error():
    images = np.random.default_rng(0).integers(0, 255, (5, 64, 64, 3), np.uint8)

    def element(i):
        if i == 9:
            raise KeyError("nine")
        return {"image": images[i], "pid": os.getpid(), "jax": "jax" in sys.modules}

    opened = os.listdir("/dev/fd")
    sequence = Workers(grain.MapDataset.range(10).map(element), 2, log_again)
    with contextlib.closing(sequence):
        for process in sequence.processes:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
        found = [sequence[i % 5] for i in range(2 * sequence.num_threads)]
        for i, x in enumerate(found):
            np.testing.assert_array_equal(x["image"], images[i % 5])
        assert {x["pid"] for x in found} == {x.pid for x in sequence.processes}
        assert not any(x["jax"] for x in found)
        with pytest.raises(KeyError, match="nine") as caught:
            sequence[9]
        assert "in element\nKeyError: 'nine'" in str(caught.value.__cause__)
        assert len(sequence) == 10
        for process in sequence.processes:
            process.kill()
        with pytest.raises(ChildProcessError, match="by SIGKILL: usually"):
            sequence[0]
    with pytest.raises(ChildProcessError, match="closed"):
        sequence[0]
    assert len(os.listdir("/dev/fd")) == len(opened)


def test_a_worker_that_cannot_load_its_sequence_is_an_error(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "short_lived.py").write_text("class Items(list): pass")
    from short_lived import Items

    (tmp_path / "short_lived.py").write_text("raise OSError('no such disk')")
    with (
        contextlib.closing(Workers(Items("abc"), 1, log_again)) as sequence,
        pytest.raises(OSError, match="no such disk"),
    ):
        sequence[0]


# No `if __name__ == "__main__"`, and a class that no module has.
ENDINGS = """
import os, sys
from mixer_jax.data.workers import Workers, log_again

class Squares:
    def __len__(self): return 10
    def __getitem__(self, i): return i * i

sequence = Workers(Squares(), 1, log_again)
print(sequence[3], flush=True)
exec(sys.argv[1])
"""


@pytest.mark.parametrize(
    "end",
    ["os.kill(os.getpid(), 9)", "raise KeyError", "Workers(Squares(), 1, log_again)"],
)
def test_no_worker_is_left_however_the_program_ends(end):
    # The workers have the same output open, so this waits for them too.
    done = subprocess.run(
        [sys.executable, "-c", ENDINGS, end],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "9\n"
    assert ("KeyError" in done.stderr) == ("KeyError" in end)


def test_batches_that_are_dropped_leave_no_worker(split):
    class Known(workers.Workers):
        def __init__(self, *args):
            super().__init__(*args)
            started.extend(self.processes)

    started = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "Workers", Known)
        batches = pipeline.train_batches(
            split[0], TRAIN, batch_size=4, seed=0, workers=1
        )
    next(batches)
    (process,) = started
    assert process.poll() is None
    del batches
    assert process.poll() == -signal.SIGKILL


def test_usual_number_of_workers(monkeypatch, caplog):
    class Files:
        def __getitem__(self, i):
            return Example(b"the contents of a file", 0, f"image {i}")

    class Arrays(Files):
        def __getitem__(self, i):
            return Example(np.zeros((8, 8, 3), np.uint8), 0, f"image {i}")

    class Locked(Files):
        def __init__(self):
            self.lock = threading.Lock()

    monkeypatch.setattr(workers, "num_cores", lambda: 112)
    assert usual_workers(Files(), 10**6) == 14
    assert usual_workers(Files(), 10**6, sharers=4) == 3
    assert usual_workers(Files(), 10**6, sharers=8) == 0
    assert usual_workers(Files(), 10**4) == 0
    assert usual_workers(Arrays(), 10**6) == 0
    assert not caplog.records
    assert usual_workers(Locked(), 10**6) == 0
    assert "cannot pickle '_thread.lock'" in caplog.text
    for cores, count in (2, 0), (15, 0), (16, 2), (1000, 16):
        monkeypatch.setattr(workers, "num_cores", lambda cores=cores: cores)
        assert usual_workers(Files(), 10**6) == count
    monkeypatch.setattr(os, "name", "nt")
    assert usual_workers(Files(), 10**6) == 0


def test_no_workers_for_what_cannot_be_pickled_and_on_windows(monkeypatch):
    with pytest.raises(DatasetError, match=r"lock.*--config.workers=0"):
        Workers([threading.Lock()], 1, log_again)
    monkeypatch.setattr(os, "name", "nt")
    with pytest.raises(DatasetError, match="Windows has no worker processes"):
        Workers("abc", 1, log_again)
