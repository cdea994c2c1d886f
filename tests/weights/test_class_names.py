import json
import logging

import pytest

from mixer_jax.weights.class_names import read_class_names
from mixer_jax.weights.layout import CheckpointError

NAMES = ["ant", "bee", "sabre-toothed cat", "élan"]
TEXT = "\n".join(NAMES)


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode(),
        f"{TEXT}\n\n \n".encode(),
        TEXT.replace("\n", "\r\n").encode(),
        f"\ufeff{TEXT}\n".encode(),
        f"{TEXT}  \n".encode(),
        json.dumps(NAMES).encode(),
        f"\ufeff{json.dumps(NAMES, indent=2)}".encode(),
    ],
)
def test_names_as_editors_write_them(tmp_path, content):
    for name in ("names.txt", "names.json"):
        if name == "names.txt" or b"[" in content:
            (tmp_path / name).write_bytes(content)
            assert read_class_names(tmp_path / name) == NAMES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "names is empty"),
        (b" \n\n", "names is empty"),
        (b"[]", "names is empty"),
        (b'{"0": "ant", "1": "bee"}', 'names holds the JSON object \'{"0": "ant"'),
        (b'["ant", 2]', "names: name 2 is 2"),
        (b'[["n01440764", "tench"]]', r"names: name 1 is \['n01440764', 'tench'\]"),
        (b'["ant", "bee"', "names is no JSON file: Expecting"),
        (b"ant\n\nbee\n", "names: name 2 is ''"),
        (b"ant\ncaf\xe9\n", "names is not a text in UTF-8: .* at byte 7"),
        (b"\xff" * (2**24 + 1), "names is larger than 16 MB"),
        ("ant\nbee".encode("utf-16"), "names is not a text in UTF-8"),
    ],
)
def test_what_is_no_list_of_names(tmp_path, content, message):
    path = tmp_path / "names"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_class_names(path)
    assert str(error.value).endswith("in the order of the classes.")


def test_a_name_that_is_there_twice_is_a_warning(tmp_path, caplog):
    (tmp_path / "names").write_text("crane\nant\ncrane\n")
    with caplog.at_level(logging.WARNING, logger="mixer_jax"):
        assert read_class_names(tmp_path / "names") == ["crane", "ant", "crane"]
    assert "the same name for several classes: 'crane'" in caplog.text
