"""The JSON files of a workdir, which may be damaged or come from anyone."""

import json
import re

import pytest

from mixer_jax.run.records import read_run
from mixer_jax.weights.layout import CheckpointError

from .test_loading import RUN


@pytest.fixture
def write(tmp_path):
    """Writes the files of a run, with changes."""

    def write(name="config.json", content=None, **changes):
        config = json.loads(json.dumps(RUN))
        for key, value in changes.items():
            *path, last = key.split(".")
            node = config
            for part in path:
                node = node[part]
            node[last] = value
        files = {"config.json": config, "class_names.json": ["a", "b"]}
        for file, values in (files | {name: content or files[name]}).items():
            (tmp_path / file).write_text(json.dumps(values))
        return tmp_path

    return write


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dataset": ["a"]}, "dataset is ['a']; expected a text that is not empty"),
        ({"dataset": "a\0b"}, r"dataset is 'a\x00b'; expected a text"),
        ({"model": []}, "model.patches.size is missing"),
        ({"model.num_blocks": "2"}, "model.num_blocks is '2'; expected a whole number"),
        ({"pp.mean": {}}, "pp.mean is {}; expected a number from 0 to 1"),
        ({"pp.resize": 10**6}, "16, and at most 4096 each way. Take another copy"),
        ({"pp.resize": 8}, "pp.resize is 8; expected at least pp.crop, which is 16"),
        ({"pp.crop": float("nan")}, "pp.crop is nan; expected a whole number"),
        ({"loss": {"softmax": 1}}, "loss is {'softmax': 1}; expected one of"),
    ],
)
def test_a_wrong_value_in_config_json_is_named(write, changes, message):
    workdir = write(**changes)
    with pytest.raises(CheckpointError, match=re.escape(message)) as error:
        read_run(workdir)
    assert str(error.value).startswith(f"{workdir}/config.json is not as a run writes")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", ["a"]),
        ("class_names.json", {"0": "a"}),
        ("class_names.json", ["a", 1]),
        ("class_names.json", ["a", "\ud800"]),
        ("dataset.json", ["a"]),
        ("dataset.json", {"multilabel": "yes"}),
        ("dataset.json", {"fingerprint": {"splits": {"test": 3}}}),
        ("dataset.json", {"fingerprint": {"classes": {"count": -1}, "splits": {}}}),
    ],
)
def test_a_file_that_is_something_else_is_named(write, name, content):
    workdir = write(name, content)
    with pytest.raises(CheckpointError, match="is not as a run writes it") as error:
        read_run(workdir)
    assert str(error.value).startswith(f"{workdir}/{name} is not")
    (workdir / name).write_bytes(b"\0")
    with pytest.raises(CheckpointError, match=rf"{name} is no JSON file"):
        read_run(workdir)
