import logging

import pytest

from mixer_jax.data.names import (
    clean_classes,
    clean_name,
    find_split,
    printable,
    split_kinds,
)


def test_bytes_that_are_not_utf8_can_be_printed():
    name = b"caf\xe9/\xc3\xa9.jpg".decode("utf-8", "surrogateescape")
    assert printable(name) == "caf\\xe9/é.jpg"
    printable(name).encode("utf-8")


@pytest.mark.parametrize(
    "name", ["cat", " cat", "cat\t", "cat\u00a0", "\ufeffcat", "cat \u200b"]
)
def test_blanks_around_a_name_do_not_count(name):
    assert clean_name(name) == "cat"


def test_long_names_take_no_time():
    """Of 100,000 letters a search from each of them, or sorting them, takes minutes."""
    for inside in (" " * 100_000, "\u0301\u0323" * 50_000):
        assert clean_name(f" a{inside}b\ufeff ") == f"a{inside}b"


def test_clean_names_keep_what_is_inside():
    assert clean_name("hot  dog") == "hot  dog"
    assert clean_name("Cafe\u0301") == clean_name("Caf\u00e9") == "Caf\u00e9"


def test_merged_classes_are_told(caplog):
    with caplog.at_level(logging.WARNING):
        clean = clean_classes("x", ["cat", "cat ", "Cafe\u0301", "Caf\u00e9", "dog"])
    assert set(clean.values()) == {"cat", "Caf\u00e9", "dog"}
    assert "x: 'cat' and 'cat ' are one class, 'cat'" in caplog.text
    assert r"'Cafe\u0301' and 'Caf\xe9' are one class" in caplog.text


@pytest.mark.parametrize(
    "pair",
    [("Cat", "cat"), ("1", "01"), ("1", "1.0"), ("hot dog", "hot_dog"), ("n1", "n01")],
)
def test_classes_that_are_alike_stay_two_and_are_told(caplog, pair):
    with caplog.at_level(logging.WARNING):
        clean = clean_classes("x", [*pair, "other"])
    assert len(set(clean.values())) == 3
    assert f"{pair[0]!r} and {pair[1]!r}" in caplog.text
    assert "other" not in caplog.text


def test_different_classes_are_no_warning(caplog):
    with caplog.at_level(logging.WARNING):
        clean_classes("x", ["cat", "cats", "1", "10", "0", "100", "n01440764"])
    assert not caplog.text


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("train", "train"),
        ("Train", "train"),
        ("TRAINING", "train"),
        ("seg_train", "train"),
        ("train_images", "train"),
        ("training-set", "train"),
        ("TrainSet", "train"),
        ("trainset", "train"),
        ("train2017", "train"),
        ("test", "test"),
        ("Testing", "test"),
        ("test set", "test"),
        ("val", "validation"),
        ("VALID", "validation"),
        ("valset", "validation"),
        ("Validation", "validation"),
        ("cat", None),
        ("trainer", None),
        ("train_station", None),
        ("test_tube", None),
        ("train_test", None),
        ("contest", None),
    ],
)
def test_kinds_of_splits(name, kind):
    assert split_kinds([name]) == ({name: kind} if kind else {})


def test_another_word_counts_if_two_splits_have_it():
    assert split_kinds(["pets_train", "pets_val", "train_station"]) == {
        "pets_train": "train",
        "pets_val": "validation",
    }


def test_find_split():
    assert find_split("train", ["Train", "train"]) == "train"
    assert find_split("train", ["seg_train", "seg_test"]) == "seg_train"
    assert find_split("TEST", ["train", "test"]) == "test"
    assert find_split("validation", ["train", "val"]) == "val"
    assert find_split("val", ["train", "valid"]) == "valid"
    assert find_split("holdout", ["train", "Holdout"]) == "Holdout"
    # Not certain, or not there.
    assert find_split("val", ["valid", "validation"]) is None
    assert find_split("test", ["train", "val"]) is None
    assert find_split("cat", ["train", "test"]) is None
