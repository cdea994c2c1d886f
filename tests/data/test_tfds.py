import importlib.util
import logging
import re

import pytest

from mixer_jax.data.dataset import DatasetError, open_dataset

from ..examples import labels


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


@pytest.mark.parametrize("expression", ["valid", "train[:x]", "train[3:3]"])
def test_tfds_bad_splits_name_the_dataset(tfds_dir, expression):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir)
    with pytest.raises(DatasetError, match="tiny_shapes, split"):
        dataset.split(expression)


@pytest.mark.parametrize("expression", ["valid", "train[:x]", "train[3:3]", "train+x"])
def test_tfds_bad_splits_name_the_key_and_the_splits(tfds_dir, expression):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir)
    with pytest.raises(DatasetError) as caught:
        dataset.split(expression)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    for word in ("train (40)", "test (14)", "pp.train", "pp.test", "--split"):
        assert word in message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifar10:9.9.9", r"no 'cifar10:9.9.9'. Expected the version 3\.0\.2, or none"),
        ("cifar10/plain_text", "no 'cifar10/plain_text'. Expected no config"),
        ("imagenet_resized/9x9", "Expected the config 8x8, 16x16, 32x32"),
        ("cifar10:x.y", "Expected the version 3"),
    ],
)
def test_tfds_versions_and_configs_that_there_are(tmp_path, name, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(name, data_dir=str(tmp_path))


@pytest.mark.parametrize("name", ["TinyShapes", "tiny_shapes:1.*.*", "tiny_shapes"])
def test_tfds_own_datasets_are_found(tfds_dir, name):
    assert len(open_dataset(name, data_dir=tfds_dir).split("train")) == 40


def test_tfds_spelling_is_told(tmp_path, caplog, monkeypatch):
    from mixer_jax.data.tfds import find_name

    with caplog.at_level(logging.WARNING):
        assert find_name("cifar10:3.0.2", None) == "cifar10:3.0.2"
    assert not caplog.text
    with caplog.at_level(logging.WARNING):
        assert find_name("OxfordFlowers102:2.1.1", None) == "oxford_flowers102:2.1.1"
        assert find_name("cifar-10", None) == "cifar10"
    assert "cifar-10 is taken for cifar10 of TensorFlow Datasets" in caplog.text
    for name in ("a:b", "huggingface:mnist", "x/y/z", "no_such_dataset", "user/repo"):
        assert find_name(name, str(tmp_path)) is None


@pytest.mark.parametrize(
    "name", ["x:1", "x:*", "x/y:1", "x:1..2", "x/,", "x/a=b,c", "1x", "_", "Ünï"]
)
def test_tfds_names_that_it_cannot_read_are_no_datasets(tmp_path, name):
    with pytest.raises(DatasetError, match=f"no dataset '{re.escape(name)}'.*Expected"):
        open_dataset(name, data_dir=str(tmp_path))


def test_tfds_unprepared_names_the_extra(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "tensorflow" else find_spec(name, *args),
    )
    with pytest.raises(DatasetError, match=r"cifar10 is not prepared in .*\[tfds\]"):
        open_dataset("cifar10", data_dir=str(tmp_path))
