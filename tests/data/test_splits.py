import logging

import numpy as np
import pytest

from mixer_jax.data.dataset import DatasetError, Example, Part, open_dataset
from mixer_jax.data.splits import (
    check_readable,
    check_splits,
    choose_splits,
    count_shared,
)

from ..examples import labels, names, touch_folder, write_folder


@pytest.fixture
def folder(tmp_path):
    spec = {"train/a": 10, "train/b": 20, "val/a": 2, "val/b": 3}
    return open_dataset(str(touch_folder(tmp_path, spec)))


@pytest.mark.parametrize(
    "expression", ["train+val", "val+train", "train[:50%]+val", "train[:3] + val[1:]"]
)
def test_sums_are_their_parts(folder, expression):
    parts = [folder.split(part.strip()) for part in expression.split("+")]
    whole = folder.split(expression)
    assert labels(whole) == [label for part in parts for label in labels(part)]
    assert names(whole) == set().union(*map(names, parts))
    assert len(folder.parts(expression)) == 2


def test_splits_with_odd_names_can_be_named(tmp_path):
    spec = {
        f"{x}/{y}": 2 for x in ("train", "hold out", "a+b", "v1.0[x]") for y in "ab"
    }
    dataset = open_dataset(str(touch_folder(tmp_path, spec)))
    for name in dataset.split_names:
        assert len(dataset.split(name)) == 4
    assert len(dataset.split("hold out[:50%]+train")) == 6
    for wrong in ("train[:150%]", "train[-200%:]"):
        with pytest.raises(DatasetError, match="cannot read the split 'train"):
            dataset.split(wrong)
    with pytest.raises(DatasetError, match="cannot read the split 'train]'"):
        dataset.split("train]")
    with pytest.raises(DatasetError, match=r"no split 'b'.*--split"):
        dataset.split("train+b")


@pytest.mark.parametrize(
    ("first", "second", "shared"),
    [
        ("train[:90%]", "train[90%:]", 0),
        ("train[:90%]", "train[50%:]", 12),
        ("train", "train[:7]", 7),
        ("train", "val", 0),
        ("train+val", "val", 5),
        ("train[:10]+train[20:]", "train[5:25]", 10),
        ("train[:10]+train[5:]", "train", 30),
        ("Train", "training[-3:]", 3),
    ],
)
def test_shared_examples_are_counted(folder, first, second, shared):
    parts = folder.parts(first), folder.parts(second)
    assert count_shared(*parts) == count_shared(*reversed(parts)) == shared
    both = names(folder.split(first)) & names(folder.split(second))
    assert len(both) == shared


def test_shared_examples_of_tfds(tfds_dir):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir)

    def shared(first, second):
        return count_shared(dataset.parts(first), dataset.parts(second))

    assert dataset.parts("train[:75%]+test") == [
        Part("train", 0, 30),
        Part("test", 0, 14),
    ]
    assert shared("train[:90%]", "train[50%:]") == 16
    assert shared("train[:50%]", "train[50%:]") == 0
    assert shared("train+test", "test[3:5]") == 2
    with pytest.raises(DatasetError, match="tiny_shapes, split 'valid'"):
        dataset.parts("valid")


def test_a_split_for_validation_is_tested_on_if_there_is_no_other(folder, caplog):
    with caplog.at_level(logging.WARNING):
        assert choose_splits("x", folder) == ("train", "val")
    assert "x has no split test; val is taken to test on. pp.test" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert choose_splits("x", folder, "val", "train") == ("val", "train")
        assert choose_splits("digits", open_dataset("digits")) == ("train", "test")
    assert not caplog.text
    with pytest.raises(DatasetError, match="no split 'test'"):  # when it is named
        folder.split("test")


@pytest.fixture
def photos(tmp_path):
    return write_folder(tmp_path / "photos", {"train/a": 6, "train/b": 6, "test/a": 2})


def test_overlapping_splits_are_told(photos, caplog):
    dataset = open_dataset(str(photos))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        check_splits(dataset, "train[:75%]", "train[75%:]")
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        check_splits(dataset, "train[:75%]", "train[50%:]")
    assert "3 examples of the split to test on (train[50%:]) are also in" in caplog.text
    with caplog.at_level(logging.WARNING):
        check_splits(dataset, "train+train[:2]", "test")
    assert "2 of the 14 examples of train+train[:2] are there twice" in caplog.text


def test_one_class_is_refused(tmp_path):
    root = write_folder(tmp_path, {"train/a": 2, "test/a": 1})
    with pytest.raises(DatasetError, match=r"has one class \(a\).*one level too high"):
        check_splits(open_dataset(str(root)), "train", "test")


def test_an_unreadable_split_is_found_before_the_run(photos):
    for file in (photos / "test/a").iterdir():
        file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n")
    dataset = open_dataset(str(photos))
    with pytest.raises(DatasetError, match=r"test: none of 2 images.*Git LFS pointer"):
        check_splits(dataset, "train", "test")
    # Some unreadable images do no harm.
    check_readable("x", dataset.split("test+train"))


def test_a_split_without_labels_is_found_before_the_run(tfds_dir):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir, label_key="real_label")
    check_readable("x", dataset.split("test"))
    bare = next(
        f"test[{i}:{i + 1}]"
        for i in range(14)
        if not dataset.split(f"test[{i}:{i + 1}]")[0].labels
    )
    with pytest.raises(DatasetError, match="none of 1 images has a label"):
        check_readable("x", dataset.split(bare))


def test_readable_splits_cost_one_image(photos):
    source, read = open_dataset(str(photos)).split("train"), []

    class Counted:
        def __len__(self):
            return len(source)

        def __getitem__(self, i):
            read.append(i)
            return source[i]

    check_readable("x", Counted())
    assert len(read) <= 20
    assert np.ptp(read) > 5  # from all classes


def test_labels_may_be_rare_where_images_may_have_several():
    class Rare:
        def __len__(self):
            return 1000

        def __getitem__(self, i):
            image = np.zeros((2, 2, 3), np.uint8)
            return Example(image, (1,) if i == 777 else (), f"image {i}")

    check_readable("x", Rare())


@pytest.mark.parametrize("size", [21, 39, 100])
def test_the_images_that_are_tried_are_spread_over_the_split(size):
    class Ends:
        """Only the last images have labels, or none."""

        labelled = 0

        def __len__(self):
            return size

        def __getitem__(self, i):
            label = 1 if i >= size - self.labelled else -1
            return Example(np.zeros((2, 2, 3), np.uint8), label, f"image {i}")

    source = Ends()
    message = r"none of \d+ images, spread over the split, has a label"
    with pytest.raises(DatasetError, match=message):
        check_readable("x", source)
    source.labelled = 6
    check_readable("x", source)


def test_a_class_that_a_slice_lacks_is_told(tmp_path, caplog):
    root = write_folder(tmp_path, {"normal": 40, "defect": 1})
    dataset = open_dataset(str(root))
    with caplog.at_level(logging.WARNING):
        check_splits(dataset, "train[:90%]", "train[90%:]")
    slices = [f"train[{x}]" for x in (":90%", "90%:")]
    lines = [f"1 of 2 classes have no image in {x}: defect" for x in slices]
    assert sum(line in caplog.text for line in lines) == 1
