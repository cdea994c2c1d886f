import errno
import importlib.util
import logging
import pathlib

import numpy as np
import pytest
from PIL import Image

from mixer_jax.data import dataset as datasets
from mixer_jax.data.dataset import DatasetError, open_dataset
from mixer_jax.data.decode import ImageError, decode

from ..examples import encode, photographs, write_folder


def labels(source: datasets.Source) -> list[int]:
    return [source[i].label for i in range(len(source))]


def names(source: datasets.Source) -> set[str]:
    return {source[i].name for i in range(len(source))}


def test_digits_have_a_fixed_stratified_split():
    dataset = open_dataset("digits")
    train, test = dataset.split("train"), dataset.split("test")
    assert (len(train), len(test)) == (1433, 364)
    assert list(dataset.class_names) == list("0123456789")
    shares = np.bincount(labels(test)) / (
        np.bincount(labels(test)) + np.bincount(labels(train))
    )
    np.testing.assert_allclose(shares, 0.2, atol=0.005)
    image = train[0].image
    assert image.dtype == np.uint8
    assert image.shape == (8, 8, 3)
    assert image.max() == 255  # 16 levels of grey over the whole range
    everything = {train[i].image.tobytes() for i in range(len(train))}
    held_out = {test[i].image.tobytes() for i in range(len(test))}
    assert not everything & held_out


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


@pytest.mark.parametrize("cut", ["10%", "50%", "-3", "7", "97%"])
def test_slices_partition_a_split_and_keep_class_shares(tmp_path, cut):
    root = write_folder(tmp_path, {"train/a": 10, "train/b": 20, "test/a": 1})
    dataset = open_dataset(str(root))
    first, second = dataset.split(f"train[:{cut}]"), dataset.split(f"train[{cut}:]")
    assert len(first) + len(second) == 30
    assert names(first) | names(second) == names(dataset.split("train"))
    assert abs(sum(labels(first)) - len(first) * 2 / 3) <= 1  # b has two thirds
    assert names(dataset.split(f"train[:{cut}]")) == names(first)


def test_table_of_paths_and_labels(tmp_path):
    write_folder(tmp_path, {"images": 4})
    files = sorted(path.name for path in (tmp_path / "images").iterdir())
    table = tmp_path / "labels.csv"
    rows = [f"images/{f},{'odd' if i % 2 else 'even'}" for i, f in enumerate(files)]
    table.write_text("\n".join(["path,label", *rows]))
    dataset = open_dataset(str(table))
    assert dataset.class_names == ["even", "odd"]
    assert labels(dataset.split("train")) == [0, 1, 0, 1]
    tabs = tmp_path / "labels.TSV"
    rows = [f"images/{f}\tx\t{'test' if i else 'train'}" for i, f in enumerate(files)]
    tabs.write_text("\n".join(["path\tlabel\tsplit", *rows]))
    dataset = open_dataset(str(tabs))
    assert (len(dataset.split("train")), len(dataset.split("test"))) == (1, 3)
    assert dataset.split("test")[0].pixels().shape == (90, 120, 3)


def test_table_without_its_columns(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("file,class\na.jpg,x\n")
    with pytest.raises(DatasetError, match=r"\['file', 'class'\].*path and label"):
        open_dataset(str(table))


def test_empty_folder(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no images in train"):
        open_dataset(str(tmp_path))


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("train[", "cannot read the split"),
        ("train[:5x]", "cannot read the split"),
        ("valid", "no split 'valid'; it has 'train', 'test'"),
        ("train[90%:10%]", "is empty; 'train' has 1433"),
    ],
)
def test_bad_split_expressions(expression, message):
    with pytest.raises(DatasetError, match=message.replace("[", r"\[")):
        open_dataset("digits").split(expression)


def test_path_that_is_not_there():
    with pytest.raises(DatasetError, match=r"'/no/such/folder'.*train/<class>/<image>"):
        open_dataset("/no/such/folder")


def test_unknown_name_suggests_one():
    with pytest.raises(DatasetError, match=r"Did you mean .*'cifar10'"):
        open_dataset("cifar11")


def test_tfds_reads_prepared_data_encoded(tfds_dir):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir)
    assert list(dataset.class_names) == ["low", "high"]
    source = dataset.split("train[:75%]")
    assert len(source) == 30
    for i in range(30):
        example = source[i]
        assert isinstance(example.image, bytes)
        image = example.pixels()
        assert image.shape == (20, 30, 3)
        assert (image.min() >= 128) == example.label


def test_tfds_images_with_several_labels(tfds_dir):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir, label_key="real_label")
    assert list(dataset.class_names) == ["low", "high"]
    found = labels(dataset.split("test"))
    assert {(), (0,), (1,), (0, 1)} == set(found)
    with pytest.raises(DatasetError, match="no image with a class other_label"):
        open_dataset("tiny_shapes", data_dir=tfds_dir, label_key="other_label")


def test_first_of_each_class(tmp_path):
    root = write_folder(tmp_path, {"train/a": 5, "train/b": 2, "train/c": 4})
    source = open_dataset(str(root)).split("train")
    few = datasets.first_of_each_class(source, 3, 3)
    assert labels(few) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert few[0].name == source[0].name


@pytest.mark.parametrize("expression", ["valid", "train[:x]", "train[3:3]"])
def test_tfds_bad_splits_name_the_dataset(tfds_dir, expression):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir)
    with pytest.raises(DatasetError, match="tiny_shapes, split"):
        dataset.split(expression)


def test_tfds_unprepared_names_the_extra(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "tensorflow" else find_spec(name, *args),
    )
    with pytest.raises(DatasetError, match=r"cifar10 is not prepared in .*\[tfds\]"):
        open_dataset("cifar10", data_dir=str(tmp_path))


def test_usual_splits():
    assert datasets.default_splits("cifar100") == ("train[:98%]", "test")
    assert datasets.default_splits("cifar10:3.0.2") == ("train[:98%]", "test")
    assert datasets.default_splits("imagenet2012") == ("train[:99%]", "validation")
    assert datasets.default_splits("/my/folder") == ("train", "test")


def test_encode_round_trip():
    image = np.random.default_rng(0).integers(0, 256, (5, 6, 3), np.uint8)
    np.testing.assert_array_equal(decode(encode(image)), image)


def test_photographs_of_users_are_turned_upright_and_stored_ones_are_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image = Image.fromarray(photographs()[0])
    for split in ("train", "test"):
        path = tmp_path / split / "a" / "0.jpg"
        path.parent.mkdir(parents=True)
        image.save(path, exif=exif)
    example = open_dataset(str(tmp_path)).split("train")[0]
    assert example.pixels().shape == (640, 427, 3)
    stored = example._replace(image=path.read_bytes())
    assert stored.pixels().shape == (427, 640, 3)


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
    assert "left out 1 images that are in no class's folder" in caplog.text
    assert "loose.jpg" in caplog.text


def test_split_folders_of_other_names_are_not_taken_for_classes(tmp_path):
    root = write_folder(tmp_path, {"Training/a": 1, "Testing/a": 1})
    with pytest.raises(DatasetError, match="folders Testing, Training, but no train"):
        open_dataset(str(root))


def test_missing_split_names_one_that_is_there(tmp_path):
    root = write_folder(tmp_path, {"train/a": 1, "val/a": 1})
    with pytest.raises(DatasetError, match=r"no split 'test'.*--config.pp.test=val"):
        open_dataset(str(root)).split("test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\n", "no lines below the header"),
        (b"path;label\na.jpg;x\n", r"\['path;label'\].*separated by ','"),
        (b"path,label\n,x\n", "line 2: found .* Expected a path and a label"),
        (b"path,label\nnot/here.jpg,x\n", r"line 2: there is no file .*not/here.jpg"),
        (b"path,label\n\xe9.jpg,x\n", "is no UTF-8 table"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset(str(table))


@pytest.mark.parametrize("failures", [2, 3])
def test_what_a_network_disk_fails_to_read_is_read_again(
    tmp_path, monkeypatch, failures
):
    root = write_folder(tmp_path, {"train/a": 1})
    example = open_dataset(str(root)).split("train")[0]
    expected, waits = example.pixels(), []
    read = pathlib.Path.read_bytes

    def read_bytes(path):
        if len(waits) < failures:
            waits.append(0)
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    monkeypatch.setattr(pathlib.Path, "read_bytes", read_bytes)
    monkeypatch.setattr(datasets.time, "sleep", lambda secs: None)
    if failures == 2:
        np.testing.assert_array_equal(example.pixels(), expected)
    else:
        with pytest.raises(ImageError, match="Input/output error"):
            example.pixels()
