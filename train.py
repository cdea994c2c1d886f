"""Trains or fine-tunes a Mixer.

python train.py --config configs/b16.py --workdir runs/b16
"""

# ruff: noqa: E402 - what follows takes seconds to import, and a signal may come then
import os
import pathlib
import re
import signal
import sys
from typing import Any


def _leave(number: int, frame: Any) -> None:
    """Ends the program on a signal before or after its run, or on a second one."""
    del frame
    os.write(2, f"{signal.Signals(number).name}: ended at once.\n".encode())
    os._exit(os.EX_TEMPFAIL)  # see mixer_jax/training/stopping.py


if __name__ == "__main__":
    for _number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(_number, _leave)

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

from mixer_jax.data import names
from mixer_jax.data.dataset import DatasetError
from mixer_jax.data.decode import ImageError
from mixer_jax.run import config_file, trainer
from mixer_jax.run.compiled import keep_compiled_programs
from mixer_jax.training import processes
from mixer_jax.training.logs import TRACEBACK_NOTE
from mixer_jax.training.rows import MetricsError
from mixer_jax.weights.layout import CheckpointError

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "What to train, such as configs/b16.py or configs/b16.py:cifar100. Any value in it "
    "can be set, as in --config.base_lr=0.01.",
)
_WORKDIR = flags.DEFINE_string(
    "workdir", None, "Folder of the run and its result. Default: runs/<config name>."
)
_COORDINATOR = flags.DEFINE_string(
    "coordinator",
    None,
    "For a run of several processes: host:port on which process 0 listens. TPU hosts, "
    "srun and mpirun do not need this flag and the next two.",
)
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "How many there are.")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "Which one this is, from 0.")


def main(argv: list[str]) -> None:
    """Runs the config that the flags name."""
    if len(argv) > 1:
        raise app.UsageError(f"Not a flag: {' '.join(argv[1:])}")
    if not flags.FLAGS["verbosity"].present:
        absl_logging.set_verbosity(absl_logging.WARNING)  # of the libraries
    workdir = _WORKDIR.value or f"runs/{_config_name()}"
    keep_compiled_programs()
    try:
        with processes.initialize(
            _COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value
        ):
            trainer.train_and_evaluate(_CONFIG.value, workdir)
    except (
        processes.ProcessError,
        trainer.ConfigError,
        trainer.NonFiniteError,
        trainer.RunStopped,
        DatasetError,
        ImageError,
        CheckpointError,
        trainer.WorkdirInUseError,
        MetricsError,
        KeyboardInterrupt,
        OSError,
        MemoryError,
    ) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(processes.exit_status(error))
    except Exception as error:
        notes = getattr(error, "__notes__", [])  # JAX adds some too
        where = [note for note in notes if note.startswith(TRACEBACK_NOTE)]
        if not where:
            raise
        sys.exit("\n".join([f"{type(error).__name__}: {error}", *where]))


def _parse_flags(argv: list[str]) -> list[str]:
    """Parses flags as absl does, with one message for what is wrong with a config."""
    names.print_any_name()
    try:
        return config_file.parse_flags(flags.FLAGS, argv)
    except trainer.ConfigError as error:
        sys.exit(f"ConfigError: {error}")


def _config_name() -> str:
    """Names a config after its file and its argument: b16, b16-cifar100."""
    name = config_flags.get_config_filename(flags.FLAGS["config"])
    file, _, argument = name.partition(":")
    stem = pathlib.Path(file).stem
    return re.sub(r"[^\w.-]+", "_", f"{stem}-{argument}" if argument else stem)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=_parse_flags)
