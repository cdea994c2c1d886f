"""Messages of a run: on the console, and with more detail in <workdir>/train.log."""

import contextlib
import logging
import os
import pathlib
import sys
from collections.abc import Iterator

import jax
from tqdm import tqdm

from mixer_jax.data.names import PRINTABLE
from mixer_jax.files import DiskError, writing
from mixer_jax.training.processes import RunStopped

PROGRESS = logging.DEBUG  # lines that a progress bar makes superfluous

TRACEBACK_NOTE = "The traceback is in"  # begins a note on an error


class _ConsoleHandler(logging.Handler):
    """Prints messages above the progress bar, if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        prefix = (
            f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
        )
        encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
        text = (prefix + self.format(record)).encode(encoding, PRINTABLE)
        try:
            tqdm.write(text.decode(encoding), file=sys.stdout)
            sys.stdout.flush()
        except OSError:  # such as a closed pipe to `head`: the run continues
            with contextlib.suppress(OSError):  # it is no real file, as in a notebook
                _discard_output()


class _FileHandler(logging.FileHandler):
    """Writes train.log. Where that fails it says so once, and the run goes on.

    No result depends on the log, and it may be written in a thread of a library.
    """

    failed = quiet = False

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            super().handleError(record)
            return
        said, self.failed = self.failed or self.quiet, True
        if not said:
            print(
                f"warning: {self.baseFilename} cannot be written: {error.strerror}. "
                "The run goes on without it.",
                file=sys.stderr,
                flush=True,
            )

    def close(self) -> None:
        with contextlib.suppress(OSError):  # of the lines that could not be written
            super().close()


def _discard_output() -> None:
    """Sends what is printed from now on to nowhere."""
    stdout, stderr = sys.stdout.fileno(), sys.stderr.fileno()
    null = os.open(os.devnull, os.O_WRONLY)
    if os.path.sameopenfile(stdout, stderr):  # 2>&1
        os.dup2(null, stderr)
    os.dup2(null, stdout)
    os.close(null)


@contextlib.contextmanager
def logging_to(workdir: pathlib.Path) -> Iterator[None]:
    """Sends messages and Python's warnings to <workdir>/train.log and to the console.

    An error that ends the run is written to train.log with its traceback, and gets a
    note that says so. It is raised again: the caller shows it on the console. If
    train.log cannot be written later, the run goes on without it, with a warning.

    Of several processes the first one writes train.log. The others print warnings only.
    """
    is_main = jax.process_index() == 0
    console = _ConsoleHandler()
    console.setLevel(logging.INFO if sys.stdout.isatty() else PROGRESS)
    handlers: list[logging.Handler] = [console]
    if is_main:
        with writing(workdir / "train.log"):
            file = _FileHandler(
                workdir / "train.log", encoding="utf-8", errors=PRINTABLE
            )
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        handlers.append(file)
    else:
        console.setLevel(logging.WARNING)
    loggers = [logging.getLogger("mixer_jax"), logging.getLogger("py.warnings")]
    levels = [logger.level for logger in loggers]
    logging.captureWarnings(True)
    for logger in loggers:
        logger.setLevel(PROGRESS)
        logger.propagate = False
        for handler in handlers:
            logger.addHandler(handler)
    loggers[0].info("workdir  %s", workdir)
    try:
        yield
    except BaseException as error:
        if is_main:
            file.quiet = isinstance(error, DiskError)  # one message for a full disk
            file.handle(record := _last_record(error))
            if record.exc_info and not file.failed:
                error.add_note(f"{TRACEBACK_NOTE} {file.baseFilename}.")
        raise
    finally:
        logging.captureWarnings(False)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
            logger.propagate = True
            for handler in handlers:
                logger.removeHandler(handler)
        for handler in handlers:
            handler.close()


def _last_record(error: BaseException) -> logging.LogRecord:
    """Returns the line of train.log about what ends the run."""
    wanted = isinstance(error, RunStopped | KeyboardInterrupt)
    return logging.LogRecord(
        name=__name__,
        level=logging.INFO if wanted else logging.ERROR,
        pathname=__file__,
        lineno=0,
        msg="%s: %s",
        args=(type(error).__name__, error),
        exc_info=None if wanted else (type(error), error, error.__traceback__),
    )
