"""From the start of Python to the end of the first step, in new processes."""

import itertools
import json
import os
import pathlib
import pickle
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from mixer_jax.benchmark.report import Row
from mixer_jax.benchmark.timing import Spread
from mixer_jax.run.compiled import MIN_COMPILE_SECS
from mixer_jax.run.config import Config

# What a start consists of, in turn.
STAGES = ("import", "devices", "data", "program", "init", "compile", "first step")
SHOWN_PACKAGES = 10  # of the imports, those that take longest


class StartError(RuntimeError):
    """A process that was to be timed failed."""


def benchmark_start(config: Config, repeats: int) -> tuple[list[Row], list[Row]]:
    """Starts a run's first step in new processes, by turns without and with a cache.

    The devices must be free: this process has not used JAX yet. "cold" has an empty
    compilation cache, "warm" what the process before it has kept.

    Args:
      config: of the run.
      repeats: processes of each kind.

    Returns:
      Rows of seconds by stage, and rows of seconds to import each package, without what
      it imports itself.

    Raises:
      StartError: a process failed.
    """
    secs: dict[str, list[dict[str, float]]] = {"cold": [], "warm": []}
    imports: list[dict[str, float]] = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as cache:
            for found in secs.values():
                found.append(_start(config, pathlib.Path(cache)))
        imports.append(_import())
    rows: list[Row] = [
        {
            "cache": kind,
            **{name: Spread.of(x[name] for x in found) for name in found[0]},
        }
        for kind, found in secs.items()
    ]
    names = sorted(imports[0], key=imports[0].__getitem__, reverse=True)
    packages: list[Row] = [
        {"package": name, "secs": Spread.of(x.get(name, 0.0) for x in imports)}
        for name in names[:SHOWN_PACKAGES]
    ]
    return rows, packages


def _start(config: Config, cache: pathlib.Path) -> dict[str, float]:
    """Starts a process that makes the first step.

    Returns:
      its seconds by stage, with all of it as "total secs" and of processor time as
      "cpu secs".
    """
    environment = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(MIN_COMPILE_SECS),
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_ENABLE_COMPILATION_CACHE": "1",
    }
    start = time.time()
    done = _python(
        ["-m", "mixer_jax.benchmark.first_step"], environment, pickle.dumps(config)
    )
    ends = json.loads(done.stdout.splitlines()[-1])
    times = [start, *(ends[name] for name in STAGES)]
    secs = [after - before for before, after in itertools.pairwise(times)]
    stages = dict(zip(STAGES, secs, strict=True))
    whole = {"total secs": sum(secs), "cpu secs": ends["cpu"]}
    return stages | whole


def _import() -> dict[str, float]:
    """Returns the seconds of a run's imports, by package.

    In a process of its own: to take their times takes a fifth more of it.
    """
    done = _python(["-X", "importtime", "-c", "import mixer_jax.run.trainer"])
    return _imports(done.stderr.decode(errors="replace").splitlines())


def _python(
    arguments: Sequence[str],
    environment: Mapping[str, str] = os.environ,
    given: bytes = b"",
) -> subprocess.CompletedProcess[bytes]:
    done = subprocess.run(
        [sys.executable, *arguments],
        input=given,
        # For who has not installed this package, and runs in its folder.
        env={**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        check=False,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").splitlines()
        raise StartError("\n".join(["The first step failed.", *lines[-20:]]))
    return done


def _imports(lines: Sequence[str]) -> dict[str, float]:
    """Adds up what -X importtime says of modules, in seconds by their package."""
    micros: Counter[str] = Counter()
    for name, found in _modules(lines):
        micros[name.partition(".")[0]] += found
    return {name: found / 1e6 for name, found in micros.items()}


def _modules(lines: Sequence[str]) -> Iterator[tuple[str, int]]:
    for line in lines:
        if found := re.match(r"import time: +(\d+) \| +\d+ \| +([\w.]+)$", line):
            yield found[2], int(found[1])
