import contextlib
import itertools
import logging
import pathlib

import numpy as np
import pytest

from mixer_jax.data import pipeline
from mixer_jax.data.dataset import DatasetError, Example, open_dataset
from mixer_jax.data.decode import ImageError
from mixer_jax.data.preprocess import EvalTransform, TrainTransform

from ..examples import encode, write_folder, write_mixed_folder


class Numbered:
    """Images whose every pixel, like the label, is their number; some are damaged."""

    def __init__(self, length, damaged=()):
        self.length, self.damaged = length, set(damaged)

    def __len__(self):
        return self.length

    def __getitem__(self, i):
        image = encode(np.full((6, 6, 3), i, np.uint8))
        return Example(b"damaged" if i in self.damaged else image, i, f"image {i}")


WHOLE = TrainTransform(4, area_range=(1, 1), aspect_range=(1, 1), flip=False)


def take(iterator, count):
    with contextlib.closing(iterator):
        return list(itertools.islice(iterator, count))


def train(count, *, length=20, damaged=(), transform=WHOLE, **kwargs):
    kwargs = {"batch_size": 8, "seed": 0} | kwargs
    return take(
        pipeline.train_batches(Numbered(length, damaged), transform, **kwargs), count
    )


def equal(xs, ys):
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys, strict=True):
        assert x.keys() == y.keys()
        for key in x:
            np.testing.assert_array_equal(x[key], y[key])


def test_every_example_once_an_epoch_in_another_order():
    labels = np.concatenate([batch["label"] for batch in train(5)])
    first, second = labels[:20], labels[20:]
    assert sorted(first) == sorted(second) == list(range(20))
    assert list(first) != list(range(20))
    assert list(first) != list(second)


def test_images_belong_to_their_labels():
    for batch in train(6):
        assert batch["image"].shape == (8, 4, 4, 3)
        assert batch["image"].dtype == np.uint8
        np.testing.assert_array_equal(batch["image"][:, 0, 0, 0], batch["label"])


def test_stream_is_a_function_of_seed_and_step():
    transform = TrainTransform(4)
    batches = train(7, transform=transform)
    equal(batches, train(7, transform=transform))
    for start in (1, 4, 6):
        resumed = train(7 - start, transform=transform, start_step=start)
        equal(batches[start:], resumed)
    other = train(1, transform=transform, seed=1)[0]
    assert list(other["label"]) != list(batches[0]["label"])


@pytest.mark.parametrize("rows", [range(4), range(4, 8), [0, 1, 6, 7]])
def test_processes_read_their_rows_of_each_batch(rows):
    whole = train(5, transform=TrainTransform(4))
    part = train(5, transform=TrainTransform(4), rows=rows)
    equal([{k: x[list(rows)] for k, x in batch.items()} for batch in whole], part)


def test_damaged_images_are_replaced_and_told_once(caplog):
    with caplog.at_level(logging.WARNING):
        batches = train(10, damaged=[3, 11])
    labels = np.concatenate([batch["label"] for batch in batches])
    assert len(labels) == 80
    assert not {3, 11} & set(labels)
    assert caplog.text.count("skipping image 3:") == 1
    assert caplog.text.count("skipping image 11:") == 1
    equal(batches, train(10, damaged=[3, 11]))


def test_training_on_a_folder_goes_on_without_its_damaged_files(tmp_path, caplog):
    damaged = write_mixed_folder(tmp_path, 60, 12)
    damaged_train = {file for file in damaged if "/train/" in file}
    source = open_dataset(str(tmp_path)).split("train")
    batches = pipeline.train_batches(source, WHOLE, batch_size=len(source), seed=0)
    with caplog.at_level(logging.WARNING):
        (batch,) = take(batches, 1)
    assert len(batch["image"]) == len(source)
    told = [record.message for record in caplog.records]
    assert {x.split(":")[0].removeprefix("skipping ") for x in told} == damaged_train


@pytest.mark.parametrize("training", [True, False])
def test_a_file_that_goes_away_is_an_error_and_one_that_was_missing_is_not(
    tmp_path, caplog, training
):
    write_folder(tmp_path, {"train/a": 8, "train/b": 8})
    dataset = open_dataset(str(tmp_path))
    source = dataset.split("train")
    pathlib.Path(source.images[3]).unlink()
    for column in dataset.columns("train").values():  # as at the start of a run
        list(column)
    assert dataset.missing == {source.images[3]}

    def read():
        given = {"split": "train[:9]", "missing": dataset.missing, "batch_size": 16}
        if training:
            return take(pipeline.train_batches(source, WHOLE, seed=0, **given), 1)
        return take(pipeline.eval_batches(source, EvalTransform(4), **given), None)

    (batch,) = read()
    assert training or batch["mask"].sum() == 15
    assert caplog.text.count("skipping") == 1
    pathlib.Path(source.images[5]).unlink()
    with pytest.raises(DatasetError) as caught:
        read()
    assert str(caught.value) == (
        f"{source.images[5]}, an image of the split train[:9], cannot be read: "
        "No such file or directory. Bring it back, or its disk; then give the same "
        "command again."
    )


def test_a_reader_that_dies_is_an_error():
    """Grain's thread would end, and what waits for it wait for ever."""

    class Dying(Numbered):
        def __getitem__(self, i):
            raise SystemExit(3)

    with pytest.raises(DatasetError, match=r"reader of example \d+ ended with Sys"):
        take(pipeline.train_batches(Dying(20), WHOLE, batch_size=4, seed=0), 1)


def test_nothing_but_damaged_images_is_an_error():
    with pytest.raises(ImageError, match="100 images in a row"):
        train(1, damaged=range(20))


@pytest.mark.parametrize("length", [1, 7, 8, 9, 24, 1000])
@pytest.mark.parametrize("processes", [1, 2])
def test_evaluation_counts_every_example_once(length, processes):
    source = Numbered(length)
    if length > 256:
        source.__class__ = type("Wide", (Numbered,), {"__getitem__": wide_item})
    batch_size = 64 if length == 1000 else 8
    seen = []
    batches = []
    for i in range(processes):
        batches.append(
            take(
                pipeline.eval_batches(
                    source,
                    EvalTransform(4),
                    batch_size=batch_size,
                    rows=range(i, batch_size, processes),
                ),
                None,
            )
        )
        for batch in batches[-1]:
            seen += list(batch["label"][batch["mask"] == 1])
    assert sorted(seen) == list(range(length))
    assert len({len(b) for b in batches}) == 1  # all processes take as many steps
    assert len({b["image"].shape for part in batches for b in part}) == 1


def wide_item(self, i):
    return Example(np.zeros((6, 6, 3), np.uint8), i, f"image {i}")


class Unlabelled(Numbered):
    """As the test splits that TensorFlow Datasets has for some competitions."""

    def __getitem__(self, i):
        return super().__getitem__(i)._replace(label=-1)


def test_examples_without_labels_are_not_scored_and_cannot_be_trained_on():
    batches = take(
        pipeline.eval_batches(Unlabelled(3), EvalTransform(4), batch_size=4), None
    )
    assert not batches[0]["mask"].any()
    with pytest.raises(DatasetError, match="has no label"):
        take(pipeline.train_batches(Unlabelled(20), WHOLE, batch_size=4, seed=0), 1)


def test_evaluation_leaves_damaged_images_out_and_tells(caplog):
    source = Numbered(10, damaged=[4])
    with caplog.at_level(logging.WARNING):
        batches = take(
            pipeline.eval_batches(source, EvalTransform(4), batch_size=4), None
        )
    labels = np.concatenate([b["label"][b["mask"] == 1] for b in batches])
    assert list(labels) == [0, 1, 2, 3, 5, 6, 7, 8, 9]
    assert "skipping image 4" in caplog.text


class SeveralLabels(Numbered):
    def __getitem__(self, i):
        return super().__getitem__(i)._replace(label=[(), (1,), (0, 2)][i % 3])


def test_several_labels_become_rows_and_none_is_masked():
    (batch,) = take(
        pipeline.eval_batches(
            SeveralLabels(6), EvalTransform(4), batch_size=8, num_classes=3
        ),
        None,
    )
    rows = [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    np.testing.assert_array_equal(batch["label"], [*rows, *rows, rows[0], rows[0]])
    np.testing.assert_array_equal(batch["mask"], [0, 1, 1, 0, 1, 1, 0, 0])


def test_several_labels_in_training_and_where_all_are_to_be_found():
    """There an image of no class is an example too."""
    found = take(
        pipeline.train_batches(
            SeveralLabels(6), TrainTransform(4), batch_size=6, seed=0, num_classes=3
        ),
        1,
    )[0]["label"]
    rows = [[0, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert found.dtype == np.float32
    assert sorted(found.tolist()) == sorted(rows * 2)
    (batch,) = take(
        pipeline.eval_batches(
            SeveralLabels(6),
            EvalTransform(4),
            batch_size=8,
            num_classes=3,
            multilabel=True,
        ),
        None,
    )
    np.testing.assert_array_equal(batch["mask"], [1, 1, 1, 1, 1, 1, 0, 0])
