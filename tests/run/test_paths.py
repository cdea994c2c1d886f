"""What of a config is a path, and what is a name."""

import os

import pytest

from configs import common
from mixer_jax.run import paths

from .test_trainer import tiny_config


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a dataset, a table and a folder that is called as a dataset is."""
    for name in ("photos", "cifar10", "digits", "sam"):
        (tmp_path / "here" / name).mkdir(parents=True)
    (tmp_path / "here" / "t.csv").touch()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path / "here"))
    return tmp_path / "here"


@pytest.mark.parametrize(
    ("key", "value", "path"),
    [
        ("dataset", "photos", "photos"),
        ("dataset", "./photos/", "photos"),
        ("dataset", "../here/photos", "photos"),
        ("dataset", "~/photos", "photos"),
        ("dataset", "t.csv", "t.csv"),
        ("dataset", "cifar10", "cifar10"),  # open_dataset takes the folder too
        ("dataset", "digits", None),  # and here what ships with scikit-learn
        ("dataset", "cifar100", None),
        ("dataset", "oxford_flowers102:2.1.1", None),
        ("dataset", "photoz", None),
        ("evals.more.dataset", "photos", "photos"),
        ("pretrained_dir", "weights", "weights"),
        ("pretrained_dir", "./sam", "sam"),
        ("pretrained_dir", "sam", None),  # a published folder
        ("pretrained_dir", "sam/", None),
        ("pretrained_dir", "gs://mixer_models/sam", None),
        ("pretrained_dir", "https://host/folder", None),
        ("pretrained_dir", "", None),
        ("init_from", "runs/a", "runs/a"),
        ("tfds_data_dir", "data", "data"),
        ("tfds_data_dir", "~/data", "data"),
        ("tfds_data_dir", "gs://bucket/data", None),
        ("tfds_manual_dir", "data", "data"),
    ],
)
def test_paths_are_made_absolute_and_names_stay(here, key, value, path):
    config = tiny_config(init_from="")
    common.add_evaluator(config, "more")
    config.update_from_flattened_dict({key: value})
    absolute, typed = paths.with_absolute_paths(config)
    expected = str(here / path) if path else value
    assert absolute.to_dict() != config.to_dict() if path else not typed
    assert typed.get(key, value) == value
    node = absolute
    for piece in key.split("."):
        node = node[piece]
    assert node == expected
    assert config.to_dict() == config.copy_and_resolve_references().to_dict()


def test_one_path_however_it_is_spelled(here, tmp_path):
    (tmp_path / "link").symlink_to(here)
    spellings = ["photos", "./photos", str(here / "photos"), "~/photos"]
    spellings += ["../link/photos", os.path.relpath(here / "photos")]
    assert len({paths.resolved({"dataset": x})["dataset"] for x in spellings}) == 1
    assert paths.resolved({"dataset": "cifar100", "seed": 0}) == {
        "dataset": "cifar100",
        "seed": 0,
    }
