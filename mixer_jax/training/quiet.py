"""Orbax and TensorStore, kept from printing errors that they raise as well."""

import functools
import logging
import sys
from typing import Any


@functools.cache
def quiet_orbax() -> None:
    """Leaves out what is printed about a save that failed in the background.

    The next save, or the wait for the last one, raises the error; only its traceback on
    the console is left out. So are those of TensorStore's threads that still write when
    the event loop of a failed save is closed: nobody waits for them any more. This is
    for the whole process, as such messages may come at its very end.
    """
    show = sys.unraisablehook

    def show_news(unraisable: Any) -> None:
        if str(unraisable.exc_value) != "Event loop is closed":
            show(unraisable)

    sys.unraisablehook = show_news
    logging.getLogger("absl").addFilter(
        lambda record: not (record.exc_info and "orbax" in record.pathname)
    )
    logging.getLogger("asyncio").addFilter(
        lambda record: "exception was never retrieved" not in record.getMessage()
    )
