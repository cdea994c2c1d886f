"""Whether a file can be read is decided in one place, for all that read images."""

import contextlib
import errno
import itertools
import logging
import os
import pathlib
from random import Random

import numpy as np
import pytest
from PIL import Image

from mixer_jax.data import pipeline
from mixer_jax.data.check import check_images
from mixer_jax.data.dataset import open_dataset, readable
from mixer_jax.data.evaluations import EVALUATIONS
from mixer_jax.data.preprocess import EvalTransform, TrainTransform
from mixer_jax.evaluation.prediction import predict

from ..fuzzing.images import write_images
from ..fuzzing.mutations import mutate

SHAPES = [(1, 1), (2, 1800), (1800, 2), (1, 40_000), (31, 33)]


@pytest.fixture(scope="module")
def odd_dataset(tmp_path_factory):
    """A dataset of one class and 120 odd files, about half of them unreadable."""
    root = tmp_path_factory.mktemp("odd")
    folder = root / "train" / "odd"
    folder.mkdir(parents=True)
    sound = write_images(folder)
    rng = Random(0)
    for path in sound:
        data = path.read_bytes()
        for i in range(3):
            damaged = mutate(rng, data, path.suffix)
            path.with_name(f"{i}-{path.name}").write_bytes(damaged)
    for height, width in SHAPES:
        pixels = np.full((height, width, 3), 7, np.uint8)
        Image.fromarray(pixels).save(folder / f"{height}x{width}.png")
    (folder / "empty.jpg").touch()
    (folder / "wrong-ending.jpg").write_bytes((folder / "rgb.png").read_bytes())
    (folder / "cut.jpg").write_bytes((folder / "rgb.jpg").read_bytes()[:-60])
    (folder / "gone.png").symlink_to("nowhere")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "secret.png").write_bytes((folder / "rgb.png").read_bytes())
    return open_dataset(str(root))


@pytest.fixture(autouse=True)
def secret(monkeypatch):
    """The system refuses a file. It would not do so for root."""
    access, open_ = os.access, os.open
    is_secret = lambda path: str(path).endswith("secret.png")

    def refuse(path, flags, *args, **kwargs):
        if is_secret(path):
            raise PermissionError(errno.EACCES, "Permission denied")
        return open_(path, flags, *args, **kwargs)

    allow = lambda path, mode: not is_secret(path) and access(path, mode)
    monkeypatch.setattr(os, "access", allow)
    monkeypatch.setattr(os, "open", refuse)


def skipped(caplog):
    told = [x.message for x in caplog.records if x.message.startswith("skipping")]
    return {x.split(": ")[0].removeprefix("skipping ") for x in told}


def test_all_readers_agree(odd_dataset, loaded, caplog):
    for column in odd_dataset.columns("train").values():  # as at the start of a run
        list(column)
    odd_files, missing = odd_dataset.split("train"), odd_dataset.missing
    size = len(odd_files)
    files = [odd_files[i].name for i in range(size)]
    checked = list(check_images("train", odd_files))
    assert [x.name for x in checked] == files
    bad = {x.name for x in checked if x.error}
    assert size / 4 < len(bad) < size * 3 / 4
    names = {pathlib.Path(x).name for x in bad}
    assert {"empty.jpg", "cut.jpg", "device.png", "secret.png"} <= names
    assert not {"wrong-ending.jpg", "2x1800.png", "1x1.png", "frames.gif"} & names

    with caplog.at_level(logging.WARNING):  # as data preview and plot mixing do
        found = {x.name for x, _ in readable(odd_files[i] for i in range(size))}
    assert found == set(files) - bad
    assert skipped(caplog) == bad

    for evaluation in EVALUATIONS:
        transform = EvalTransform(16, evaluation, 18)
        batches = pipeline.eval_batches(
            odd_files, transform, batch_size=size, missing=missing
        )
        with contextlib.closing(batches):
            (batch,) = batches
        assert {x for x, ok in zip(files, batch["mask"], strict=True) if not ok} == bad

    caplog.clear()
    transform = TrainTransform(16, randaugment=(2, 10))
    batches = pipeline.train_batches(
        odd_files, transform, batch_size=size, seed=0, missing=missing
    )
    with caplog.at_level(logging.WARNING), contextlib.closing(batches):
        (batch,) = itertools.islice(batches, 1)
    assert batch["image"].shape == (size, 16, 16, 3)
    assert skipped(caplog) == bad

    predictions = predict(loaded.model, loaded.params, loaded.transform, files)
    assert {x.file for x in predictions if x.error} == bad
