"""Makes benchmarks/plan.md: plans of B/16, L/16 and H/14, as shipped and naive.

    python benchmarks/plan.py

needs the extra `tpu`, and compiles for more than an hour on two cores. Each row is
written as soon as it is known, and a second call adds the missing rows.
"""

import argparse
import importlib.metadata
import pathlib
import sys
from typing import Any

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for configs

from mixer_jax.plan import Plan, plan

PATH = pathlib.Path(__file__).with_suffix(".md")
# Changes of the config.
STEPS: dict[str, dict[str, Any]] = {
    "default": {},
    "blocks": {"model.remat": "blocks"},
    "naive": {"model.dtype": "float32", "model.remat": "none", "mesh.fsdp": 1},
}

# Config, topology, images of an update, and devices that share a copy of the state.
ROWS = [
    ("b16", "v5e:2x4", 512, 1),
    ("l16", "v5e:4x4", 512, 1),
    ("h14", "v5e:4x4", 512, 1),
    ("l16", "v5e:2x4", 512, 8),
    ("h14", "v5e:2x4", 512, 8),
    ("b16", "v4:2x2x2", 1024, 1),
    ("b16", "v5e:16x16", 4096, 1),
    ("b16", "v5p:2x2x2", 1024, 1),
    ("l16", "v4:2x2x2", 1024, 8),
    ("l16", "v5p:2x2x2", 1024, 8),
    ("l16", "v5e:16x16", 4096, 16),
    ("h14", "v4:2x2x2", 512, 8),
    ("h14", "v5p:2x2x2", 1024, 8),
    ("h14", "v5e:16x16", 4096, 16),
]
HEADER = """# Plans

Made by `python benchmarks/plan.py` with jax {jax} and libtpu {libtpu}; 224 pixels, 1000
classes, one update with accum_steps 1. Memory and work are of one chip. The bounds
follow from published peaks (mixer_jax/run/chips.py). No TPU was at hand: nothing was
timed. "default" is what the config gives on TPU, bfloat16 and the remat of the next
column; "blocks" is the same with remat "blocks"; "naive" is float32, without remat,
with the state on every chip. "moved" is between a chip's memory and its units, without
what stays in the fast memory on the chip; "sent" is to other chips. The script adds the
rows that are not here yet.

| model | topology | batch | step | remat | fsdp | state GB | temporaries GB | peak GB \
| fits | TFLOP | GB moved | GB sent | compute ms | memory ms | network ms \
| at most images/s |
|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def key(name: str, topology: str, batch: int, step: str) -> str:
    """Returns the start of a row, which no other row has."""
    return f"| {name} | {topology} | {batch} | {step} |"


def format_row(result: Plan, name: str, step: str) -> str:
    """Returns one row of the table; nan stands for what the compiler does not say."""
    needs, bounds_secs = result.needs, result.bounds_secs.values()
    cells = [
        result.config.model.remat,
        f"{result.config.mesh.fsdp}",
        f"{(needs.params_bytes + needs.opt_state_bytes) / 1e9:.2f}",
        f"{needs.temporary_bytes / 1e9:.2f}",
        f"{needs.peak_bytes / 1e9:.2f}",
        "yes" if result.fits else "no",
        f"{needs.flops / 1e12:.2f}",
        f"{needs.memory_bytes / 1e9:.1f}",
        f"{needs.network_bytes / 1e9:.2f}",
        *(f"{1e3 * secs:.1f}" for secs in bounds_secs),
        f"{result.config.batch / max(bounds_secs):,.0f}",
    ]
    start = key(name, result.topology, result.config.batch, step)
    return f"{start} {' | '.join(cells)} |\n"


def main() -> None:
    """Adds the rows that are missing in the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only", default="", help="only the rows that contain this text"
    )
    args = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    header = HEADER.format(
        jax=jax.__version__, libtpu=importlib.metadata.version("libtpu")
    )
    text = PATH.read_text() if PATH.exists() else ""
    # Rows from other versions of jax or libtpu are not kept.
    lines = text.splitlines(keepends=True) if text.startswith(header) else []
    cases = {
        key(name, topology, batch, step): (name, topology, batch, fsdp, step)
        for name, topology, batch, fsdp in ROWS
        for step in STEPS
    }
    rows = {start: line for start in cases for line in lines if line.startswith(start)}
    for start, (name, topology, batch, fsdp, step) in cases.items():
        if start in rows or args.only not in start:
            continue
        config = importlib.import_module(f"configs.{name}").get_config()
        values = {"batch": batch, "accum_steps": 1, "mesh.fsdp": fsdp} | STEPS[step]
        config.update_from_flattened_dict(values)
        result = plan(config, topology)
        print(result, flush=True)
        rows[start] = format_row(result, name, step)
        PATH.write_text(header + "".join(rows[x] for x in cases if x in rows))


if __name__ == "__main__":
    main()
