"""Errors of a config file, or of a value that is set on the command line."""

import pathlib
import traceback

import absl
import ml_collections

_LIBRARIES = [pathlib.Path(x.__path__[0]) for x in (absl, ml_collections)]


def describe_error(error: Exception) -> str:
    """Returns one message for an error that absl's flags raised with a config.

    For an error in a config file it gives the file, the line and the error, and the
    lines of the functions that the file called. For the command line it gives the flag
    or key that is wrong.
    """
    cause: BaseException | None = error
    while cause is not None:
        if lines := _lines_of_config(cause):
            return f"{' -> '.join(lines)}: {type(cause).__name__}: {_reason(cause)}"
        # absl and ml_collections wrap the error of the file in another one.
        cause = cause.__cause__ or cause.__context__
    if isinstance(error, OSError):
        return f"The config cannot be read: {str(error).splitlines()[-1].strip()}"
    reason = _reason(error)
    return f"The config has no key {reason}" if reason.startswith("'") else reason


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
