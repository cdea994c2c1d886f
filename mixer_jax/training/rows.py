"""The rows of metrics.jsonl: the numbers of a run by step, a JSON object a line."""

import pathlib
from collections.abc import Iterator

from mixer_jax.data.values import is_whole
from mixer_jax.files import parse_json

Row = dict[str, float]


class MetricsError(ValueError):
    """A metrics.jsonl that is damaged."""


def parse_row(line: bytes) -> Row | None:
    """Returns the numbers in a line, "step" among them; None if it is damaged."""
    try:
        row = parse_json(line)
    except ValueError:
        return None
    if not isinstance(row, dict) or not is_whole(row.get("step"), 0):
        return None
    numbers = all(type(value) in (int, float) for value in row.values())
    return row if numbers else None


def read_rows(path: pathlib.Path) -> Iterator[Row]:
    """Yields the rows of a metrics.jsonl.

    The last one may be cut off, by a crash or since a run still writes it. It is left
    out then.

    Raises:
      FileNotFoundError: it is not there.
      MetricsError: one of its lines is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such file. Is {path.parent} a run's workdir?"
        )
    with path.open("rb") as file:
        for i, line in enumerate(file, start=1):
            row = parse_row(line)
            if row is None and line.endswith(b"\n"):
                found = line[:60].strip().decode("utf-8", "backslashreplace")
                raise MetricsError(
                    f"{path}, line {i}: found {found!r}. Expected a JSON object of "
                    'numbers with a "step". Remove this line.'
                )
            if row is not None:
                yield row
