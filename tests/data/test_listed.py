import importlib.util

import numpy as np
import pytest
from sklearn.datasets import load_digits

from mixer_jax.data import listed
from mixer_jax.data.dataset import DatasetError, open_dataset
from mixer_jax.data.fingerprint import fingerprint
from mixer_jax.data.listed import ListedSource

from ..examples import labels, names, touch_folder, write_folder


@pytest.mark.parametrize("spec", ["found", None])
def test_digits_are_those_of_scikit_learn(spec, monkeypatch):
    if spec is None:  # as if its file were elsewhere
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    pixels, labels = listed._read_digits()
    expected = load_digits()
    np.testing.assert_array_equal(pixels, expected.images)
    np.testing.assert_array_equal(labels, expected.target)
    assert labels.dtype == np.int64


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


@pytest.mark.parametrize("cut", ["10%", "50%", "-3", "7", "97%"])
def test_slices_partition_a_split_and_keep_class_shares(tmp_path, cut):
    root = write_folder(tmp_path, {"train/a": 10, "train/b": 20, "test/a": 1})
    dataset = open_dataset(str(root))
    first, second = dataset.split(f"train[:{cut}]"), dataset.split(f"train[{cut}:]")
    assert len(first) + len(second) == 30
    assert names(first) | names(second) == names(dataset.split("train"))
    assert abs(sum(labels(first)) - len(first) * 2 / 3) <= 1  # b has two thirds
    assert names(dataset.split(f"train[:{cut}]")) == names(first)


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


def test_missing_split_names_one_that_is_there(tmp_path):
    root = write_folder(tmp_path, {"train/a": 1, "val/a": 1})
    with pytest.raises(DatasetError, match=r"no split 'test'.*--config.pp.test=val"):
        open_dataset(str(root)).split("test")


def test_the_order_of_slices_stays_as_it_was():
    """The examples of train[:90%] must not change from one version to the next."""

    def expected(labels):
        rng = np.random.default_rng(0)
        position = np.empty(len(labels))
        for label in np.unique(labels):
            members = rng.permutation(np.flatnonzero(labels == label))
            spread = np.arange(len(members)) + rng.random()
            position[members] = spread / len(members)
        return np.argsort(position, kind="stable")

    labels = np.random.default_rng(1).geometric(0.1, 500)  # some classes are missing
    for single in (labels, np.sort(labels), labels[:1]):
        source = ListedSource(np.arange(len(single)), single)
        np.testing.assert_array_equal(source.stratified_order, expected(single))
    several = np.empty(500, object)
    several[:] = [(int(x), 3)[: x % 3] for x in labels]
    source = ListedSource(labels, several)
    first = np.where(labels % 3 == 0, -1, labels)
    np.testing.assert_array_equal(source.stratified_order, expected(first))


def test_the_order_of_a_split_is_computed_once(tmp_path, monkeypatch):
    dataset = open_dataset(str(touch_folder(tmp_path, {"a": 6, "b": 6})))
    order, made = ListedSource.stratified_order.func, []
    monkeypatch.setattr(
        ListedSource.stratified_order, "func", lambda x: made.append(1) or order(x)
    )
    for expression in ("train[:50%]", "train[50%:]", "train[:2]+train[3:]"):
        fingerprint(dataset, [expression])
        dataset.split(expression)
    assert len(made) == 1
