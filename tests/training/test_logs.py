"""What the log of a run has, and what the console shows."""

import io
import logging
import sys
import warnings

import pytest

from mixer_jax.files import DiskError
from mixer_jax.training.logs import logging_to
from mixer_jax.training.processes import RunStopped

logger = logging.getLogger("mixer_jax.somewhere")


def run(workdir, error=None):
    """A run that logs a line, and ends with an error."""
    with logging_to(workdir):
        logger.info("a line")
        if error is not None:
            raise error
    return (workdir / "train.log").read_text()


def test_messages_are_in_the_log_and_on_the_console(tmp_path, capsys):
    log = run(tmp_path)
    assert capsys.readouterr().out == f"workdir  {tmp_path}\na line\n"
    assert log.endswith(" INFO a line\n")
    assert logger.getEffectiveLevel() > logging.INFO  # as before
    logger.info("a line after the run")
    assert (tmp_path / "train.log").read_text() == log


@pytest.mark.parametrize("kind", [OSError, ValueError, MemoryError])
def test_an_error_is_in_the_log_with_its_traceback(tmp_path, capsys, kind):
    error = kind("No space left on device")
    with pytest.raises(kind) as caught:
        run(tmp_path, error)
    assert caught.value is error
    log = (tmp_path / "train.log").read_text()
    assert f"ERROR {kind.__name__}: No space left on device\nTraceback (most" in log
    assert "raise error\n" in log
    assert "No space" not in capsys.readouterr().out  # the caller shows it
    assert error.__notes__ == [f"The traceback is in {tmp_path / 'train.log'}."]


def test_names_that_are_not_in_utf8_are_shown_and_logged(tmp_path, monkeypatch):
    console = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", console)
    with logging_to(tmp_path):
        logger.warning("skipping %s", "caf\udce9 und th\u00e9.jpg")
    assert b"warning: skipping caf\\xe9 und th\\xe9.jpg\n" in console.buffer.getvalue()
    log = (tmp_path / "train.log").read_text("utf-8")
    assert "WARNING skipping caf\\xe9 und th\u00e9.jpg\n" in log


def test_a_stop_is_no_error(tmp_path):
    stopped = RunStopped(7, 12, tmp_path, "SIGTERM")
    for error in (stopped, KeyboardInterrupt("Ended at once.")):
        with pytest.raises(type(error)):
            run(tmp_path, error)
    log = (tmp_path / "train.log").read_text()
    assert "INFO RunStopped: Stopped at step 7 of 12 by SIGTERM. The same" in log
    assert "INFO KeyboardInterrupt: Ended at once." in log
    assert "Traceback" not in log


def test_pythons_warnings_are_in_the_log_and_on_the_console(tmp_path, capsys):
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        with logging_to(tmp_path):
            warnings.warn("these images are odd", stacklevel=1)
    log = (tmp_path / "train.log").read_text()
    assert "UserWarning: these images are odd" in log
    assert "warning: " in capsys.readouterr().out
    assert warnings.showwarning is shown


def test_a_log_that_cannot_be_written_is_said_once_and_the_run_goes_on(tmp_path, capfd):
    (tmp_path / "train.log").symlink_to("/dev/full")
    with logging_to(tmp_path):
        logger.info("a line")
        logger.info("another")
    found = capfd.readouterr()
    assert found.out.endswith("a line\nanother\n")
    assert found.err == (
        f"warning: {tmp_path / 'train.log'} cannot be written: No space left on device."
        " The run goes on without it.\n"
    )


def test_a_full_disk_is_one_message_and_names_no_log_that_does_not_have_it(
    tmp_path, capfd
):
    (tmp_path / "train.log").symlink_to("/dev/full")
    with pytest.raises(DiskError) as caught, logging_to(tmp_path):
        raise DiskError("checkpoints cannot be written")
    assert not hasattr(caught.value, "__notes__")
    assert capfd.readouterr().err.count("\n") == 1  # from the first line of the log
