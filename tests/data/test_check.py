import logging
import shutil

import cv2
import numpy as np
import pytest

from mixer_jax.data.check import check_images, summarize, warnings
from mixer_jax.data.dataset import Example, open_dataset

from ..examples import encode, write_folder, write_mixed_folder


def check(name, **options):
    dataset = open_dataset(str(name), **options)
    checked = [
        x
        for split in dataset.split_names
        for x in check_images(split, dataset.split(split))
    ]
    return checked, dataset.class_names


def unreadable(checked):
    return {x.name for x in checked if x.error}


@pytest.mark.parametrize(
    ("count", "damaged"), [(60, 12), pytest.param(2000, 20, marks=pytest.mark.slow)]
)
def test_finds_exactly_the_damaged_files(tmp_path, count, damaged):
    expected = write_mixed_folder(tmp_path, count, damaged)
    assert len(expected) == damaged
    checked, class_names = check(tmp_path)
    assert unreadable(checked) == expected
    assert len(checked) == count
    totals = [row for row in summarize(checked, class_names) if row[1] == "all"]
    assert sum(int(row[2].replace(",", "")) for row in totals) == count - damaged
    assert sum(int(row[3]) for row in totals) == damaged
    assert warnings(checked, class_names) == []


def test_summary_counts_classes_and_gives_sizes(tmp_path):
    root = write_folder(tmp_path, {"train/a": 2, "train/b": 1, "test/b": 1})
    (root / "train/a/large.png").write_bytes(encode(np.zeros((300, 200, 3), np.uint8)))
    (root / "train/a/empty.jpg").touch()
    rows = summarize(*check(root))
    assert rows == [
        ("split", "class", "images", "unreadable", "smallest", "largest"),
        ("test", "a", "0", "0", "-", "-"),
        ("test", "b", "1", "0", "120 x 90", "120 x 90"),
        ("test", "all", "1", "0", "120 x 90", "120 x 90"),
        ("train", "a", "3", "1", "120 x 90", "200 x 300"),
        ("train", "b", "1", "0", "120 x 90", "120 x 90"),
        ("train", "all", "4", "1", "120 x 90", "200 x 300"),
    ]


def test_many_classes_take_one_row(tmp_path):
    root = write_folder(tmp_path, {f"{i:02}": 1 for i in range(51)})
    assert [row[:3] for row in summarize(*check(root))[1:]] == [("train", "all", "51")]


def test_copies_in_other_splits_and_classes_are_told(tmp_path):
    root = write_folder(tmp_path, {"train/a": 3, "train/b": 3, "test/a": 2})
    shutil.copy(root / "train/a/001.PNG", root / "test/a/renamed.png")
    # The same pixels in another file.
    image = cv2.imread(str(root / "train/b/001.PNG"))
    cv2.imwrite(
        str(root / "train/a/again.webp"), image, [cv2.IMWRITE_WEBP_QUALITY, 101]
    )
    leaked, mislabelled = warnings(*check(root))
    assert "1 images are in several splits" in leaked
    assert f"{root}/test/a/renamed.png = {root}/train/a/001.PNG" in leaked
    assert "1 images are in several classes" in mislabelled
    assert f"{root}/train/a/again.webp = {root}/train/b/001.PNG" in mislabelled


def test_each_of_several_labels_counts(tfds_dir):
    checked, class_names = check(
        "tiny_shapes", data_dir=tfds_dir, label_key="real_label"
    )
    rows = [row[:3] for row in summarize(checked, class_names) if row[0] == "test"]
    # Of 14 images every third has no label, and every third has both.
    assert rows == [
        ("test", "low", "6"),
        ("test", "high", "7"),
        ("test", "(no label)", "5"),
        ("test", "all", "14"),
    ]
    (copies,) = [x for x in warnings(checked, class_names) if "several splits" in x]
    assert "14 images" in copies  # tiny_shapes draws the images of both alike


class Unlabelled:
    """Images of which the last three are not labelled."""

    def __init__(self, labels):
        self.labels = labels

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = np.full((40, 40, 3), i, np.uint8)
        return Example(image, self.labels[i], f"image {i}")


@pytest.mark.parametrize("count", [2, 60])
def test_images_without_a_label_are_no_class(count):
    checked = list(check_images("test", Unlabelled([0, -1, -1, -1])))
    class_names = [f"class {i}" for i in range(count)]
    rows = [row[:3] for row in summarize(checked, class_names)]
    assert ("test", "(no label)", "3") in rows
    assert ("test", "all", "4") in rows
    assert ("test", f"class {count - 1}", "3") not in rows


def test_oddities_do_not_count_missing_labels():
    checked = list(check_images("train", Unlabelled([0, 1, *[-1] * 60])))
    assert warnings(checked, ["a", "b"]) == []  # and not: 60 images of b
    # A copy without a label is not in another class, and one with other labels is.
    copy = checked[0]._replace(labels=())
    assert warnings([*checked, copy], ["a", "b"]) == []
    copy = checked[0]._replace(labels=(0, 1))
    (message,) = warnings([*checked, copy], ["a", "b"])
    assert "1 images are in several classes" in message
    assert warnings(checked[2:], ["a", "b"]) == []


def test_tiny_images_and_uneven_classes_are_told(tmp_path):
    root = write_folder(tmp_path, {"a": 1, "b": 20})
    (root / "a/tiny.png").write_bytes(encode(np.zeros((31, 50, 3), np.uint8)))
    (small,) = warnings(*check(root))
    assert "1 images are less than 32 pixels" in small
    assert "tiny.png (50 x 31)" in small
    (root / "a/tiny.png").unlink()
    (uneven,) = warnings(*check(root))
    assert uneven == "classes of train are very uneven: 20 images of b, 1 of a"


def test_missing_file_of_a_table_is_unreadable(tmp_path):
    write_folder(tmp_path, {"images": 1})
    table = tmp_path / "labels.csv"
    table.write_text("path,label\nimages/000.jpg,a\nimages/gone.jpg,a\n")
    checked, _ = check(table)
    assert [x.error for x in checked] == [None, "No such file or directory"]


def test_tfds_and_digits(tfds_dir, caplog):
    with caplog.at_level(logging.WARNING):
        checked, _ = check("tiny_shapes", data_dir=tfds_dir)
        assert len(checked) == 54
        assert {(x.width, x.height, x.error) for x in checked} == {(30, 20, None)}
        checked, _ = check("digits")
        assert len(checked) == 1797
    assert not caplog.text
