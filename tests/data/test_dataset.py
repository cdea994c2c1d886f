import pytest
from PIL import Image

from mixer_jax.data.dataset import (
    DatasetError,
    Example,
    default_splits,
    first_of_each_class,
    open_dataset,
)

from ..examples import labels, photographs, write_folder


def test_path_that_is_not_there():
    with pytest.raises(DatasetError, match=r"'/no/such/folder'.*train/<class>/<image>"):
        open_dataset("/no/such/folder")


def test_unknown_name_suggests_one():
    with pytest.raises(DatasetError, match=r"Did you mean .*'cifar10'"):
        open_dataset("cifar11")


def test_usual_splits():
    assert default_splits("cifar100") == ("train[:98%]", "test")
    assert default_splits("cifar10:3.0.2") == ("train[:98%]", "test")
    assert default_splits("imagenet2012") == ("train[:99%]", "validation")
    assert default_splits("/my/folder") == ("train", "test")


def test_first_of_each_class(tmp_path):
    root = write_folder(tmp_path, {"train/a": 5, "train/b": 2, "train/c": 4})
    source = open_dataset(str(root)).split("train")
    few = first_of_each_class(source, 3, 3)
    assert labels(few) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert few[0].name == source[0].name


def test_first_of_each_class_wants_one_label(tfds_dir):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir, label_key="real_label")
    with pytest.raises(DatasetError, match=r"example \d+ has the labels .*one label"):
        first_of_each_class(dataset.split("train"), 2, 1)


def test_labels_of_an_example():
    labels = [Example(b"", label, "").labels for label in (0, 3, -1, (), (2, 0))]
    assert labels == [(0,), (3,), (), (), (2, 0)]


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
