"""JSON texts that may be damaged, or come from anyone: read within bounds."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

# In bytes. Parsed, a JSON text takes up to 24 times its size. The largest that this
# package writes are lists of class names: those of ImageNet-21k are 0.5 MB.
LARGEST_JSON = 2**24
_DEEPEST_JSON = 100


def read_json(path: pathlib.Path, error: Callable[[str], Exception]) -> Any:
    """Reads a JSON file that may be damaged, or come from anyone.

    Args:
      path: of the file, with or without a byte order mark.
      error: makes the error from its message.

    Raises:
      FileNotFoundError: there is none.
      OSError: it cannot be read.
      What `error` makes: it is no file, or as for `parse_json`.
    """
    if path.exists() and not path.is_file():  # a pipe would wait, a device never end
        raise error(f"{path} is no file. Expected one with a JSON text.")
    with path.open("rb") as file:
        text = file.read(LARGEST_JSON + 1)
    try:
        return parse_json(text)
    except ValueError as problem:
        raise error(f"{path} is no JSON file: {problem}.") from problem


def parse_json(text: str | bytes) -> Any:
    """Returns the values in a JSON text that may be damaged, or come from anyone.

    A whole number that no float can hold becomes infinite, as others do.

    Raises:
      ValueError: it is no JSON text, larger than LARGEST_JSON, or nested more than a
        hundred times.
    """
    if len(text) > LARGEST_JSON:
        raise ValueError(f"found more than {LARGEST_JSON:,} bytes")
    too_deep = ValueError(f"it is nested more than {_DEEPEST_JSON} times")
    try:
        values = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise too_deep from None
    level = [values]
    for _ in range(_DEEPEST_JSON):
        parents = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in parents for y in (x.values() if isinstance(x, dict) else x)]
    if level:
        raise too_deep
    return values


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) < 300 else float(digits)
