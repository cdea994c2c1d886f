"""Compiled programs are kept from one process to the next, in a folder of the user.

JAX does it: its persistent compilation cache. The key of a program holds the program,
the compiler's flags and options, the versions of jaxlib and the backend, and the device
(jax/_src/cache_key.py). For CPUs, XLA compares the processor's features when it loads a
program; on some it refuses all (github.com/jax-ml/jax/issues/38445).
"""

import logging
import os
import pathlib
from typing import Any

import filelock
import jax
import pooch

MAX_BYTES = 2**30  # of the folder; a large model's train step takes about 10 MB
MIN_COMPILE_SECS = 0.2  # what takes less is not kept

logger = logging.getLogger(__name__)


def keep_compiled_programs() -> None:
    """Lets JAX keep what it compiles, in the system's place for this user's caches.

    Not in $MIXER_JAX_CACHE: others may write there, and this is code that is run.

    JAX's environment variables come first: JAX_ENABLE_COMPILATION_CACHE=0 turns it
    off, JAX_COMPILATION_CACHE_DIR names a cache of the user's own. If the folder cannot
    be written, or someone else could write there, nothing is kept.
    JAX warns if it cannot read or write a program, and compiles it.
    """
    config: Any = jax.config  # its values are attributes that types do not know
    if not config.jax_enable_compilation_cache or config.jax_compilation_cache_dir:
        return
    folder = pathlib.Path(pooch.os_cache("mixer_jax")) / "compiled"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_private(folder):
            logger.warning(
                "Compiled programs are not kept: other users can write to %s. Remove "
                "the folder, or take their right to write: chmod go-w",
                folder,
            )
            return
        # JAX's own lock: several processes may use the folder at a time.
        with filelock.FileLock(folder / ".lockfile").acquire(timeout=10):
            _remove_cut_off(folder)
    except (OSError, NotImplementedError) as error:  # NotImplementedError: no locks
        logger.debug("Compiled programs are not kept: %s", error)
        return
    config.update("jax_compilation_cache_dir", str(folder))
    for name, value in (
        ("jax_compilation_cache_max_size", MAX_BYTES),
        ("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECS),
    ):
        if name.upper() not in os.environ:
            config.update(name, value)


def _is_private(folder: pathlib.Path) -> bool:
    """Returns whether nobody but this user (and root) can write to a folder."""
    if not hasattr(os, "getuid"):  # Windows: it is in the user's own profile
        return True
    about = folder.stat()
    return about.st_uid == os.getuid() and not about.st_mode & 0o022


def _remove_cut_off(folder: pathlib.Path) -> None:
    """Removes programs that a process did not live to write to the end.

    JAX writes the time of the last use after the program. Where it is missing, JAX 0.10
    can write no other program (github.com/jax-ml/jax/issues/39880).
    """
    for path in folder.glob("*-cache"):
        if not path.with_name(path.name.removesuffix("cache") + "atime").exists():
            path.unlink(missing_ok=True)
