"""The names of a model's classes, from a file."""

import logging
import pathlib
from collections import Counter

from mixer_jax.data.values import is_name
from mixer_jax.json_files import LARGEST_JSON, parse_json
from mixer_jax.weights.layout import CheckpointError

logger = logging.getLogger(__name__)

_EXPECTED = (
    "Expected one name a line, or a JSON list of names, in the order of the classes."
)


def read_class_names(path: pathlib.Path) -> list[str]:
    """Reads a file with one name a line, or with a JSON list of names; in UTF-8.

    Blanks around lines, empty lines at the end and a byte order mark are left out.
    Names that stand there twice are a warning: in the usual list of ImageNet's classes
    two are called "crane".

    Raises:
      OSError: there is no such file.
      CheckpointError: it is empty or not in UTF-8, or holds anything but names.
    """
    with path.open("rb") as file:
        data = file.read(LARGEST_JSON + 1)
    if len(data) > LARGEST_JSON:
        raise CheckpointError(f"{path} is larger than 16 MB. {_EXPECTED}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CheckpointError(
            f"{path} is not a text in UTF-8: {error.reason} at byte {error.start}. "
            f"Save it in UTF-8. {_EXPECTED}"
        ) from error
    if path.suffix == ".json" or text.lstrip().startswith(("[", "{")):
        names = _parse_json(path, text)
    else:
        names = [line.strip() for line in text.rstrip().splitlines()]
    if not names:
        raise CheckpointError(f"{path} is empty. {_EXPECTED}")
    for i, name in enumerate(names, start=1):
        if not is_name(name):
            raise CheckpointError(f"{path}: name {i} is {name!r:.80}. {_EXPECTED}")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        shown = ", ".join(f"{name!r:.80}" for name in twice[:5])
        logger.warning("%s has the same name for several classes: %s", path, shown)
    return names


def _parse_json(path: pathlib.Path, text: str) -> list:
    try:
        names = parse_json(text) if text.strip() else []
    except ValueError as error:
        raise CheckpointError(
            f"{path} is no JSON file: {error}. {_EXPECTED}"
        ) from error
    if not isinstance(names, list):
        kind = "object" if isinstance(names, dict) else "value"
        raise CheckpointError(
            f"{path} holds the JSON {kind} {text.strip()[:60]!r}. {_EXPECTED}"
        )
    return names
