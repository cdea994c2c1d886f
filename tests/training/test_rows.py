import json
import logging

import pytest

from mixer_jax.training.metrics import MetricsWriter
from mixer_jax.training.rows import MetricsError, read_rows

ROWS = [{"step": step, "train/loss": 1 / step} for step in range(1, 6)]
LINES = [json.dumps(row).encode() + b"\n" for row in ROWS]


@pytest.fixture
def path(tmp_path):
    return tmp_path / "metrics.jsonl"


@pytest.mark.parametrize(
    "end", [b"", b'{"step": 6, "tr', b'{"step', b"\0\0\0", b"\xff"]
)
def test_what_a_crash_cut_off_is_left_out(path, end):
    path.write_bytes(b"".join(LINES) + end)
    assert list(read_rows(path)) == ROWS


@pytest.mark.parametrize(
    "line",
    [
        *(b"", b"[]", b"null", b"{}", b'{"step": null}', b'{"step": true}', b"\0"),
        *(b'{"step": -1}', b'{"step": 1.5}', b'{"step": "1"}', b'{"step": 1, "a": []}'),
        *(b'{"step": 1, "a": "b"}', b'{"step": 1e999}', b"[" * 9999, b'"\xff"'),
    ],
)
def test_a_damaged_line_is_named(path, line):
    path.write_bytes(LINES[0] + line + b"\n" + LINES[1])
    with pytest.raises(MetricsError, match=r"metrics\.jsonl, line 2: found .* Remove"):
        list(read_rows(path))


def keep(path, step):
    writer = MetricsWriter(path.parent, step, True)
    writer.write(step, {"train/loss": 9.0})  # known at this step, and so left out
    writer.write(step + 1, {"train/loss": 0.5})
    writer.close()
    return path.read_bytes()


def test_a_run_goes_on_after_damaged_lines(path, caplog):
    new = b'{"step": 4, "train/loss": 0.5}\n'
    path.write_bytes(b"".join(LINES))
    whole = keep(path, 3)
    assert whole == b"".join(LINES[:3]) + new
    path.write_bytes(b"".join(LINES) + b'{"step": 6, "tr')
    assert keep(path, 3) == whole
    path.write_bytes(b"".join(LINES[:3]).rstrip(b"\n"))  # only its end is missing
    with caplog.at_level(logging.WARNING):
        assert keep(path, 3) == whole
        assert caplog.text == ""
        path.write_bytes(LINES[0] + b"\0\0\n[]\n" + b"".join(LINES[1:]))
        assert keep(path, 3) == whole
    assert "damaged, and removed, are the lines 2, 3" in caplog.text
