"""Errors of saves in the background are neither printed twice nor waited for."""

import logging
import sys
import threading

import pytest

from mixer_jax.files import DiskError
from mixer_jax.training import background

ERROR = ValueError("Failed writing [os_error_code='28']")


class Ended(list):
    """As Watch, of a process among several."""

    end = list.append


@pytest.fixture
def ended(monkeypatch, tmp_path):
    ended = Ended()
    monkeypatch.setattr(background, "current", lambda: ended)
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    filters = {name: logging.getLogger(name).filters for name in ("absl", "asyncio")}
    for name, found in filters.items():
        monkeypatch.setattr(logging.getLogger(name), "filters", list(found))
    background.quiet_orbax(tmp_path)
    return ended


def record(file, error=None):
    """What absl logs, at any place of a file."""
    about = error and (type(error), error, None)
    made = logging.LogRecord("absl", logging.ERROR, file, 1, "text", (), about)
    return logging.getLogger("absl").filter(made)


def test_only_errors_that_orbax_raises_too_are_left_out(ended):
    assert not record("/site-packages/orbax/checkpoint/async_checkpointer.py", ERROR)
    assert record("/site-packages/orbax/checkpoint/async_checkpointer.py")
    assert record("/site-packages/tfds/builder.py", ERROR)
    background.quiet_orbax()
    assert (
        len([x for x in logging.getLogger("absl").filters if x is background._errors])
        == 1
    )
    assert not ended  # the main thread raises it


def test_a_save_that_fails_in_one_of_several_processes_ends_it(ended, tmp_path):
    args = ("/site-packages/orbax/checkpoint/async_checkpointer.py", ERROR)
    thread = threading.Thread(target=record, args=args)
    thread.start()
    thread.join()
    (error,) = ended
    assert isinstance(error, DiskError)
    assert str(error).startswith(f"{tmp_path} cannot be written: No space left")
    assert error.__cause__ is ERROR
