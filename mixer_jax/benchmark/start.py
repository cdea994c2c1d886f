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
from collections.abc import Iterator, Sequence

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
            for kind, found in secs.items():
                stages, imported = _start(config, pathlib.Path(cache))
                found.append(stages)
                if kind == "warm":
                    imports.append(imported)
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


def _start(
    config: Config, cache: pathlib.Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Starts a process.

    Returns:
      its seconds by stage, with all of it as "total secs" and of processor time as
      "cpu secs"; and those of its imports by package.
    """
    environment = {
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": str(MIN_COMPILE_SECS),
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_ENABLE_COMPILATION_CACHE": "1",
        # For who has not installed this package, and runs in its folder.
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    start = time.time()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "mixer_jax.benchmark.first_step"],
        input=pickle.dumps(config),
        env=environment,
        capture_output=True,
        check=False,
    )
    lines = done.stderr.decode(errors="replace").splitlines()
    if done.returncode:
        said = [x for x in lines if not x.startswith("import time:")]
        raise StartError("\n".join(["The first step failed.", *said[-20:]]))
    ends = json.loads(done.stdout.splitlines()[-1])
    times = [start, *(ends[name] for name in STAGES)]
    secs = [after - before for before, after in itertools.pairwise(times)]
    stages = dict(zip(STAGES, secs, strict=True))
    whole = {"total secs": sum(secs), "cpu secs": ends["cpu"]}
    return stages | whole, _imports(lines)


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
