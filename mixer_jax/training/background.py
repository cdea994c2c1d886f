"""Errors of saves in the background: one message, also where several processes save."""

import logging
import pathlib
import sys
import threading
from typing import Any

from mixer_jax.files import writing
from mixer_jax.training.processes import current


class _OrbaxErrors(logging.Filter):
    """Leaves out what Orbax logs of errors, which it raises as well.

    It raises them in the next save, or the wait for the last one. But if a part of a
    save fails in one of several processes, Orbax waits there for the others, and they
    wait for this one. So there the error ends this process, which tells the others.
    """

    folder = pathlib.Path()  # of the checkpoints of the run

    def filter(self, record: logging.LogRecord) -> bool:
        if not (record.exc_info and "orbax" in record.pathname):
            return True
        watch, error = current(), record.exc_info[1]
        is_main = threading.current_thread() is threading.main_thread()
        if watch is not None and error is not None and not is_main:
            try:
                with writing(self.folder):
                    raise error
            except Exception as told:
                watch.end(told)
        return False


_errors = _OrbaxErrors()


def quiet_orbax(folder: pathlib.Path | None = None) -> None:
    """Keeps the tracebacks of saves that fail in the background off the console.

    That holds for the whole process, since some of them come at its very end: those of
    TensorStore's threads, which still write when a failed save has closed its event
    loop, and those of writes for whose end nobody has waited.

    Args:
      folder: of the checkpoints of a run, for messages; None if nothing is saved.
    """
    if folder is not None:
        _errors.folder = folder
    absl_logger = logging.getLogger("absl")
    if _errors in absl_logger.filters:
        return
    absl_logger.addFilter(_errors)
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
    show = sys.unraisablehook

    def show_news(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_news
