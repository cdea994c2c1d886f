import importlib.util

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


def test_tfds_unprepared_names_the_extra(tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *args: None if name == "tensorflow" else find_spec(name, *args),
    )
    with pytest.raises(DatasetError, match=r"cifar10 is not prepared in .*\[tfds\]"):
        open_dataset("cifar10", data_dir=str(tmp_path))
