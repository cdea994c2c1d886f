"""A config from a file and the command line, or one message about what is wrong."""

import ast
import difflib
import pathlib
import re
import sys
import traceback
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any

import absl
import ml_collections
from absl import flags
from ml_collections import config_flags

from mixer_jax.run.config import Config, ConfigError, flatten
from mixer_jax.run.keys import values_of

CHECKOUT = pathlib.Path(__file__).parents[2]  # with the folder configs

_LIBRARIES = [pathlib.Path(x.__path__[0]) for x in (absl, ml_collections)]
_LIBRARIES.append(pathlib.Path(ast.__file__))  # they read tuples with it


def parse_flags(values: flags.FlagValues, argv: Sequence[str]) -> list[str]:
    """Parses a command line with --config, the file, and --config.KEY=VALUE.

    The file may import `configs` of this project, and modules from its own folder and
    from the one above that, wherever the program is started.

    Args:
      values: the flags, among them "config" of DEFINE_config_file.
      argv: the command line, from the name of the program on.

    Returns:
      The arguments that are no flags.

    Raises:
      ConfigError: the file cannot be read or raises an error, it has no such key, or a
        value cannot be read. The message has the file with its line, or the key.
    """
    path = _path_of_config(argv)
    folder = pathlib.Path(path.partition(":")[0]).absolute().parent
    # At the end, so that no file beside a config takes the place of a library.
    sys.path += [str(x) for x in (CHECKOUT, folder, folder.parent)]
    # The key and the text of each override.
    found = (re.match(r"--?(?:no)?config\.([^=]*)=?(.*)", x, re.DOTALL) for x in argv)
    overrides = [(match[1], match[2]) for match in found if match]
    try:
        rest = values(argv)
        config: Any = values["config"].value
        config.keys()  # raises an error if the file could not be read
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None:
            if lines := _lines_of_config(cause):
                where, kind = " -> ".join(lines), type(cause).__name__
                raise ConfigError(f"{where}: {kind}: {_reason(cause)}") from error
            # absl and ml_collections wrap the error of the file in another one.
            cause = cause.__cause__ or cause.__context__
        if isinstance(error, OSError):
            reason = str(error).splitlines()[-1].strip()
            raise ConfigError(f"The config cannot be read: {reason}") from error
        if path and overrides:
            _check_overrides(_without_overrides(path), overrides)
        raise ConfigError(_wrong_value(str(error), dict(overrides))) from error
    _check_overrides(config, overrides)
    return rest


def _path_of_config(argv: Sequence[str]) -> str:
    for i, arg in enumerate(argv):
        if match := re.match(r"--?config(=|$)", arg):
            return arg[match.end() :] or "".join(argv[i + 1 : i + 2])
    return ""


def _without_overrides(path: str) -> Config:
    values, argv = flags.FlagValues(), ["", f"--config={path}"]
    config_flags.DEFINE_config_file("config", flag_values=values, sys_argv=argv)
    values(argv)
    return values["config"].value


def _check_overrides(config: Config, overrides: Sequence[tuple[str, str]]) -> None:
    """Raises ConfigError if a key is unknown, a group of keys, or a tuple set twice."""
    values = flatten(config.to_dict())
    groups = set(config) - set(values)
    for key, times in Counter(key for key, _ in overrides).items():
        inside = [x for x in values if x.startswith(f"{key}.")]
        if inside or key in groups:
            first = inside[0] if inside else ""
            such = f", as in --config.{first}='{values[first]}'" if inside else ""
            raise ConfigError(
                f"{key} is a group of keys and has no value of its own. Set the keys "
                f"in it one by one{such}."
            )
        if key not in values:
            close = _closest(key, values)
            hint = f"Did you mean {' or '.join(close)}? " if close else ""
            raise ConfigError(
                f"The config has no key {key!r}. {hint}configs/common.py lists "
                "all keys."
            )
        if times > 1 and isinstance(values[key], tuple):
            texts = " and ".join(text for name, text in overrides if name == key)
            raise ConfigError(
                f"--config.{key} is given {times} times: {texts}. Give it once, with "
                "all of its values in brackets."
            )


def _closest(key: str, keys: Collection[str]) -> list[str]:
    """Returns the keys that may be meant: of the same last name, or spelled alike."""
    last = key.rpartition(".")[2]
    by_last = {x.rpartition(".")[2]: x for x in keys}
    if last in by_last:
        return [by_last[last]]
    near = difflib.get_close_matches(key, keys, 2)
    near += [by_last[x] for x in difflib.get_close_matches(last, by_last, 2)]
    near = near or [by_last[x] for x in by_last if last in x.split("_")]  # lr: base_lr
    return list(dict.fromkeys(near))[:2]


def _wrong_value(message: str, overrides: dict[str, str]) -> str:
    """Returns the message of absl's flags, or what is expected of a key."""
    match = re.match(r"flag --config\.([\w.]+)=", message)
    allowed = values_of(match[1]) if match else None
    if match and allowed:
        key = match[1]
        return f"{key} is {overrides[key]!r}; expected {allowed.expected}."
    return message


def _reason(error: BaseException) -> str:
    """Returns the message of an error, without the whole config in it."""
    while error.args and isinstance(error.args[0], BaseException):
        error = error.args[0]
    text = str(error.args[0]) if isinstance(error, KeyError) else str(error)
    text, _, rest = text.partition(" Other fields present")
    *_, hint = rest.rpartition("\n")
    return f"{text}\n{hint}" if hint.startswith("Did you mean") else text


def _lines_of_config(error: BaseException) -> list[str]:
    """Returns the lines, from the config file on, that an error passed."""
    if isinstance(error, SyntaxError) and not str(error.filename).startswith("<"):
        return [f"{error.filename}:{error.lineno}"]
    frames = traceback.extract_tb(error.__traceback__)
    names = [frame.name for frame in frames]
    if "parse" not in names:  # ml_collections' function that runs the file
        return []
    return [
        f"{frame.filename}:{frame.lineno}"
        for frame in frames[names.index("parse") + 1 :]
        if not frame.filename.startswith("<frozen importlib")
        and not any(pathlib.Path(frame.filename).is_relative_to(x) for x in _LIBRARIES)
    ]
