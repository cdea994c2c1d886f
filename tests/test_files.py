"""JSON texts that may be damaged, or come from anyone."""

import os

import pytest

from mixer_jax.files import parse_json, read_json


class DocumentError(ValueError):
    pass


def test_what_any_json_file_says(tmp_path):
    path = tmp_path / "a.json"
    for text, values in [
        (b'{"a": [1, -2.5, null, true]}', {"a": [1, -2.5, None, True]}),
        (b'\xef\xbb\xbf"caf\xc3\xa9"', "café"),
        (b'[[["a"]]]', [[["a"]]]),
        (b"1" + b"0" * 5000, float("inf")),
        (b"-1" + b"0" * 299, -1e299),
    ]:
        path.write_bytes(text)
        assert read_json(path, DocumentError) == values


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "Expecting value"),
        (b'{"a": 1', "Expecting"),
        (b'"\xff"', "can't decode byte 0xff"),
        (b"\0", "Expecting value"),
        (b"[" * 101 + b"]" * 101, "nested more than 100 times"),
        (b"[" * 10**6, "nested more than 100 times"),
        (b'{"a":' * 10**6, "nested more than 100 times"),
        (b" " * 2**25 + b"1", "more than 16,777,216 bytes"),
    ],
)
def test_what_is_no_json_is_named(tmp_path, text, message):
    path = tmp_path / "a.json"
    path.write_bytes(text)
    with pytest.raises(DocumentError, match=rf"a\.json is no JSON file: .*{message}"):
        read_json(path, DocumentError)
    with pytest.raises(ValueError, match=message):
        parse_json(text)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.json")
    with pytest.raises(DocumentError, match=r"a\.json is no file"):
        read_json(tmp_path / "a.json", DocumentError)
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "b.json", DocumentError)
