import logging
import os
import pathlib
import re

import pytest
from PIL import Image

from mixer_jax.data.dataset import DatasetError, open_dataset
from mixer_jax.data.decode import ImageError

from ..examples import labels, touch_folder, write_folder


def test_folder_with_every_ending_and_one_class_list(tmp_path):
    root = write_folder(
        tmp_path, {"train/cat": 4, "train/dog": 5, "test/cat": 2, "test/dog": 2}
    )
    dataset = open_dataset(str(root))
    assert dataset.class_names == ["cat", "dog"]
    train = dataset.split("train")
    assert labels(train) == [0] * 4 + [1] * 5
    assert {pathlib.Path(train[i].name).suffix for i in range(9)} == {
        ".jpg",
        ".PNG",
        ".webp",
        ".JPEG",
    }
    assert all(train[i].pixels().shape == (90, 120, 3) for i in range(9))


def test_class_of_only_one_split_keeps_the_labels_equal_and_is_told(tmp_path, caplog):
    root = write_folder(
        tmp_path, {"train/a": 1, "train/b": 1, "test/b": 1, "test/c": 1}
    )
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(root))
    assert dataset.class_names == ["a", "b", "c"]
    assert labels(dataset.split("train")) == [0, 1]
    assert labels(dataset.split("test")) == [1, 2]
    assert "1 of 3 classes have no image in train: c" in caplog.text
    assert "1 of 3 classes have no image in test: a" in caplog.text


def test_other_files_are_counted_and_hidden_ones_ignored(tmp_path, caplog):
    root = write_folder(tmp_path, {"train/a": 2, "test/a": 1})
    (root / "train/a/notes.txt").write_text("x")
    (root / "train/a/._000.jpg").write_text("x")
    (root / "train/.hidden").mkdir()
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(root))
    assert len(dataset.split("train")) == 2
    assert dataset.class_names == ["a"]
    assert "ignored 1 files" in caplog.text
    assert "1 .txt" in caplog.text


def test_folder_without_splits_is_all_train(tmp_path):
    root = write_folder(tmp_path, {"cat/kittens": 6, "cat/old": 4, "dog": 10})
    dataset = open_dataset(str(root))
    assert len(dataset.split("train")) == 20
    train, test = dataset.split("train[:80%]"), dataset.split("train[80%:]")
    assert (len(train), len(test)) == (16, 4)
    with pytest.raises(DatasetError, match=r"no split 'test'.*train\[90%:\]"):
        dataset.split("test")


def test_empty_folder(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no images in train"):
        open_dataset(str(tmp_path))


def test_a_folder_one_level_too_low(tmp_path, caplog, monkeypatch):
    root = touch_folder(tmp_path, {"train/cat": 18, "train/dog": 2})
    monkeypatch.chdir(root / "train/cat")
    above = re.escape(str(root / "train"))
    for name in (str(root / "train/cat"), "."):
        message = rf"18 images are not in class folders.*the folder above: {above}\."
        with pytest.raises(DatasetError, match=message):
            open_dataset(name)
    assert not caplog.text  # the message says it


def test_split_folder_without_images_is_left_out_and_told(tmp_path, caplog):
    root = write_folder(tmp_path, {"train/a": 1, "test/a": 1, "notes/figures": 0})
    (root / "notes/figures/readme.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(root))
    assert dataset.class_names == ["a"]
    assert list(dataset.split_names) == ["test", "train"]
    assert "no images in notes; left out" in caplog.text


def test_images_outside_of_class_folders_are_told(tmp_path, caplog):
    root = write_folder(tmp_path, {"train/a": 1, "test/a": 1})
    (root / "train/loose.jpg").touch()
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(str(root)).split("train")) == 1
    assert "left out 1 images that are not in a class folder" in caplog.text
    assert "loose.jpg" in caplog.text


def opened(root, caplog):
    with caplog.at_level(logging.WARNING):
        return open_dataset(str(root))


def sizes(dataset, *splits):
    return [len(dataset.split(split)) for split in splits]


def test_a_link_up_the_tree_makes_no_images(tmp_path, caplog):
    root = touch_folder(
        tmp_path, {"train/cat": 12, "train/dog": 12, "test/cat": 1, "test/dog": 1}
    )
    (root / "train/cat/all").symlink_to("../../train")
    dataset = opened(root, caplog)
    assert labels(dataset.split("train")) == [0] * 12 + [1] * 12
    assert "train/cat/all -> ../../train" in caplog.text


def test_a_file_belongs_to_one_class_where_it_really_is(tmp_path, caplog):
    root = touch_folder(tmp_path, {"a": 2, "b": 3})
    (root / "a/also").symlink_to("../b")
    (root / "b/a.png").symlink_to("../a/0.png")
    dataset = opened(root, caplog)
    assert labels(dataset.split("train")) == [0, 0, 1, 1, 1]
    # Through a/also leads b/a.png too, to a/0.png: that is of the same class.
    assert "left out 5 links to images that are there already, 4 of" in caplog.text
    assert f"{root}/a/also/0.png = {root}/b/0.png" in caplog.text


def test_folders_of_links_are_read(tmp_path, caplog):
    """A dataset may be made of links to a pool of images."""
    touch_folder(tmp_path / "pool", {"x": 4, "y": 2})
    root = touch_folder(tmp_path / "photos", {"train/a": 0, "train/c": 1})
    (root / "train/a/1.png").symlink_to(tmp_path / "pool/x/0.png")
    (root / "train/b").symlink_to(tmp_path / "pool/y")
    (root / "train/c/again.png").symlink_to(tmp_path / "pool/x/0.png")
    dataset = opened(root, caplog)
    assert dataset.class_names == ["a", "b", "c"]
    assert labels(dataset.split("train")) == [0, 1, 1, 2]
    assert "left out 1 links" in caplog.text


def test_links_into_another_split_are_told(tmp_path, caplog):
    root = touch_folder(tmp_path, {"train/a": 2, "train/b": 1, "test/b": 1})
    (root / "test/a").symlink_to("../train/a")
    dataset = opened(root, caplog)
    assert sizes(dataset, "train", "test") == [3, 3]
    (root / "test/a").unlink()
    (root / "test").rename(root / "x")
    (root / "test").symlink_to("train")
    opened(root, caplog)
    assert "3 images are in test and, by links, in train" in caplog.text


def test_hard_links_are_told(tmp_path, caplog):
    root = touch_folder(tmp_path, {"a": 2, "b": 1})
    os.link(root / "a/0.png", root / "b/hard.png")
    assert labels(opened(root, caplog).split("train")) == [0, 0, 1, 1]
    assert "1 images are hard links to others, 1 of them in another class" in (
        caplog.text
    )


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("Training", "Testing"),
        ("Train", "test"),
        ("seg_train", "seg_test"),
        ("training set", "test set"),
        ("pets_train", "pets_test"),
        ("trainset", "testset"),
    ],
)
def test_split_folders_by_another_name(tmp_path, caplog, train, test):
    root = touch_folder(
        tmp_path,
        {f"{train}/a": 3, f"{train}/b": 2, f"{test}/a": 1, "__MACOSX/x": 1},
    )
    dataset = opened(root, caplog)
    assert dataset.class_names == ["a", "b"]
    assert set(dataset.split_names) == {train, test}  # their names keep working
    assert sizes(dataset, "train", "test", train, test) == [5, 1, 5, 1]
    assert len(dataset.split("train[:40%]")) == 2
    assert f"{train} is taken for train" in caplog.text
    assert "left out 1 folders of other programs" in caplog.text


def test_usual_names_need_no_word(tmp_path, caplog):
    root = touch_folder(
        tmp_path, {f"{x}/{y}": 1 for x in ("train", "val", "test") for y in "ab"}
    )
    assert sizes(opened(root, caplog), "train", "validation", "test") == [2, 2, 2]
    assert not caplog.text


def test_two_folders_to_train_on_are_not_certain(tmp_path):
    spec = {"train_raw/a": 1, "train_small/a": 1, "test/a": 1}
    with pytest.raises(DatasetError, match="train_raw and train_small could be"):
        open_dataset(str(touch_folder(tmp_path / "x", spec)))
    dataset = open_dataset(str(touch_folder(tmp_path / "x", {"train/a": 3})))
    assert sizes(dataset, "train", "train_raw") == [3, 1]


@pytest.mark.parametrize("inside", ["archive", "archive/archive", "a b/c"])
@pytest.mark.parametrize("split", ["train/", ""])
def test_a_folder_one_level_too_high(tmp_path, caplog, inside, split):
    root = touch_folder(
        tmp_path, {f"{inside}/{split}a": 3, f"{inside}/{split}b": 2, "__MACOSX": 1}
    )
    (root / "README.txt").touch()
    dataset = opened(root, caplog)
    assert dataset.class_names == ["a", "b"]
    assert sizes(dataset, "train") == [5]
    assert f"{root} holds images in the folder {inside.split('/')[0]} alone" in (
        caplog.text
    )


def test_a_split_that_holds_a_folder_of_its_name(tmp_path, caplog):
    root = touch_folder(
        tmp_path,
        {
            **{"seg_train/seg_train/ice": 2, "seg_train/seg_train/sea": 2},
            **{"seg_test/seg_test/ice": 1, "seg_test/seg_test/sea": 1},
            "seg_pred/seg_pred": 3,
        },
    )
    dataset = opened(root, caplog)
    assert dataset.class_names == ["ice", "sea"]
    assert sizes(dataset, "train", "test") == [4, 2]
    assert "seg_pred is no split" in caplog.text


def test_a_single_class_of_a_test_split_stays_a_class(tmp_path):
    root = touch_folder(tmp_path, {"train/a": 1, "train/b/x": 1, "test/b/x": 1})
    dataset = open_dataset(str(root))
    assert labels(dataset.split("test")) == [1]


def test_one_class_is_no_wrapper(tmp_path):
    root = touch_folder(tmp_path, {"cat": 2, "cat/kittens": 1})
    assert open_dataset(str(root)).class_names == ["cat"]


def test_classes_may_be_called_as_splits_are(tmp_path, caplog):
    root = touch_folder(tmp_path, {"bus": 1, "car": 1, "train": 2})
    dataset = opened(root, caplog)
    assert dataset.class_names == ["bus", "car", "train"]
    assert labels(dataset.split("train")) == [0, 1, 2, 2]
    assert "taken for classes and not for splits: train" in caplog.text


def test_only_folders_with_the_same_classes_are_splits(tmp_path, caplog):
    root = touch_folder(
        tmp_path,
        {
            **{"train/cat": 2, "train/dog": 2, "test/cat": 1, "test/owl": 1},
            **{"holdout/dog": 1, "models/best": 1, "unlabelled": 2, "empty/cat": 0},
        },
    )
    dataset = opened(root, caplog)
    assert dataset.class_names == ["cat", "dog", "owl"]
    assert list(dataset.split_names) == ["holdout", "test", "train"]
    assert "models is no split: none of its folders (best) is a class of" in caplog.text
    assert "unlabelled is no split: its images are not in class folders" in caplog.text
    assert "no images in empty; left out" in caplog.text
    assert "holdout is taken for another split" in caplog.text


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"train/cat": 1, "train/dog": 1, "train/all/cat": 1, "train/all/dog": 1},
            "train/all is beside the classes cat, dog and holds folders of these",
        ),
        ({"cat": 1, "dog": 1, "cat/dog": 1}, "/cat is beside the classes dog"),
        (
            {"cat": 1, "dog": 1, "test/cat": 1, "test/dog": 1},
            "/test is beside the classes cat, dog",
        ),
        (
            {"cat/train": 1, "cat/test": 1, "dog/train": 1, "dog/test": 1},
            "cat is in the place of a class and holds the splits test, train",
        ),
        ({"train": 3, "test": 1}, "no train that holds folders of classes"),
        ({"Testing/a": 1, "val/b": 1}, "the folders Testing, val, but no train"),
        ({"train/a": 0}, "no images in train; found no files"),
    ],
)
def test_levels_that_are_mixed_up(tmp_path, spec, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(str(touch_folder(tmp_path, spec)))


def test_names_of_folders_are_cleaned(tmp_path, caplog):
    root = touch_folder(
        tmp_path,
        {
            **{"train/cat": 1, "train/cat ": 2, "train/Cafe\u0301": 1},
            **{"test/Caf\u00e9": 1, "test/Cat": 1},
        },
    )
    dataset = opened(root, caplog)
    assert dataset.class_names == ["Caf\u00e9", "Cat", "cat"]
    assert labels(dataset.split("train")) == [0, 2, 2, 2]
    assert labels(dataset.split("test")) == [0, 1]
    assert "'cat' and 'cat ' are one class" in caplog.text
    assert "'Cat' and 'cat'" in caplog.text


def test_names_that_are_not_utf8(tmp_path, caplog, capfd):
    root = touch_folder(tmp_path, {"train/a": 1, "train/b": 1, "test/a": 1})
    os.rename(bytes(root / "train/b"), bytes(root / "train") + b"/caf\xe9")
    os.rename(bytes(root / "test/a/0.png"), bytes(root / "test/a") + b"/\xff.png")
    os.mkdir(bytes(root / "test") + b"/caf\xe9")
    dataset = opened(root, caplog)
    assert dataset.class_names == ["a", r"caf\xe9"]
    example = dataset.split("test")[0]
    assert example.name == f"{root}/test/a/\\xff.png"
    example.name.encode("utf-8")
    caplog.text.encode("utf-8")
    with pytest.raises(ImageError, match="the file is empty"):  # it was found
        example.pixels()
    assert "Logging error" not in capfd.readouterr().err


def test_classes_txt_gives_names_and_order(tmp_path, caplog):
    root = touch_folder(tmp_path, {"train/cat": 1, "train/dog": 2, "test/dog": 1})
    (root / "classes.txt").write_text("\ufeffdog\n cat \n\nowl\n", "utf-8")
    dataset = opened(root, caplog)
    assert dataset.class_names == ["dog", "cat", "owl"]
    assert labels(dataset.split("train")) == [1, 0, 0]
    assert f"{root}/classes.txt gives the 3 classes" in caplog.text
    assert "no image in train: owl" in caplog.text
    (root / "classes.txt").write_text("dog\nbat\n")
    with pytest.raises(DatasetError, match=r"not in classes.txt: cat.*such as bat"):
        open_dataset(str(root))
    (root / "classes.txt").write_text("dog\ncat\ndog\n")
    with pytest.raises(DatasetError, match="found dog twice"):
        open_dataset(str(root))


def test_other_kinds_of_images(tmp_path):
    root = tmp_path
    endings = ["bmp", "gif", "jpg", "tif", "tiff", "BMP", "Gif", "TIFF"]
    for i, ending in enumerate(endings):
        folder = root / "train" / ("a", "b")[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (9, 7), (255, 0, 0)).save(folder / f"{i}.{ending}")
    source = open_dataset(str(root)).split("train")
    assert len(source) == len(endings)
    for i in range(len(source)):
        image = source[i].pixels()
        assert image.shape == (7, 9, 3)
        assert abs(image.astype(int) - (255, 0, 0)).max() < 5


def test_a_prepared_folder_of_tensorflow_datasets_is_told(tfds_dir):
    with pytest.raises(DatasetError, match=r"has prepared.*--tfds-data-dir"):
        open_dataset(f"{tfds_dir}/tiny_shapes")


def test_folders_without_images_are_no_classes(tmp_path, caplog):
    root = touch_folder(tmp_path, {"train/a": 1, "train/b": 1, "train/c": 0})
    touch_folder(root, {"test/a": 1, "test/b": 0, "test/d/e": 0})
    dataset = opened(root, caplog)
    assert dataset.class_names == ["a", "b"]
    assert "2 folders in the place of a class have no images" in caplog.text
    assert "left out: c (no files), d (no files)" in caplog.text
    caplog.clear()
    touch_folder(root / "train", {"logs": 0})
    assert opened(root / "train", caplog).class_names == ["a", "b"]
    assert "left out: c (no files), logs (no files)" in caplog.text


def test_a_class_of_unknown_files_is_told_with_their_kind(tmp_path, caplog):
    root = touch_folder(tmp_path, {"cat": 2, "dog": 2, "photos": 0})
    (root / "photos/1.heic").write_bytes(b"x")
    with caplog.at_level(logging.WARNING):
        assert open_dataset(str(root)).class_names == ["cat", "dog"]
    assert "no images; left out: photos (1 .heic)" in caplog.text


@pytest.mark.parametrize(
    ("spec", "common"),
    [
        ({"fold1/cat": 2, "fold1/dog": 2, "fold2/cat": 2, "fold2/dog": 1}, "cat, dog"),
        ({"cat/images": 2, "dog/images": 2}, None),
        ({"cat/old": 2, "cat/young": 2, "dog/large": 2, "dog/small": 2}, None),
    ],
)
def test_classes_that_may_be_one_level_lower_are_told(tmp_path, caplog, spec, common):
    root = touch_folder(tmp_path, spec)
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(root))
    assert dataset.class_names == sorted({x.split("/")[0] for x in spec})
    assert ("are taken for classes, and several" in caplog.text) == bool(common)
    assert f"the same names: {common}." in caplog.text or not common
