"""The command mixer-jax: parses the command line, calls, prints.

A subcommand is a function below `app.command` in `benchmarks`, `figures`, `models`,
`parameters` or `runs`: its arguments are the flags, its docstring the help.
"""

import logging
import os
import sys

from absl import logging as absl_logging

# Importing them registers their subcommands.
from mixer_jax.cli import benchmarks as benchmarks
from mixer_jax.cli import figures as figures
from mixer_jax.cli import models as models
from mixer_jax.cli import parameters as parameters
from mixer_jax.cli import runs as runs
from mixer_jax.cli.app import UsageError, app
from mixer_jax.data import names
from mixer_jax.data.dataset import DatasetError
from mixer_jax.data.decode import ImageError
from mixer_jax.files import FileError
from mixer_jax.run.compiled import keep_compiled_programs
from mixer_jax.training.rows import MetricsError
from mixer_jax.weights.export import ExportError
from mixer_jax.weights.layout import CheckpointError


def main() -> None:
    """Runs the subcommand that the command line names."""
    names.print_any_name()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    absl_logging.set_verbosity(absl_logging.ERROR)  # of the libraries
    keep_compiled_programs()
    # tyro knows only flags that are declared, so overrides become positional.
    args = [x for x in sys.argv[1:] if not x.startswith("--config.")]
    overrides = [x[2:] for x in sys.argv[1:] if x.startswith("--config.")]
    # Behind --config and its value, if given: other flags take several values.
    end = next((i for i, x in enumerate(args) if x.startswith("--config=")), len(args))
    end = args.index("--config") + 1 if "--config" in args else end
    args[end + 1 : end + 1] = overrides
    try:
        app.cli(
            prog="mixer-jax",
            description="Uses models that mixer_jax has trained or can read.",
            args=args or ["--help"],
        )
    except KeyboardInterrupt:
        sys.exit(130)  # what a shell says of Ctrl-C
    except BrokenPipeError:  # the reader of the output, such as head, is done
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (
        CheckpointError,
        DatasetError,
        ExportError,
        FileError,
        ImageError,
        UsageError,
        MetricsError,
        MemoryError,
        OSError,
    ) as error:
        sys.exit(f"{type(error).__name__}: {error}")
