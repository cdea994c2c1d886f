"""What a benchmark found, as a table and as JSON, and where it was measured."""

import dataclasses
import datetime
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mixer_jax.benchmark.timing import Spread
from mixer_jax.data.workers import num_cores
from mixer_jax.training.agreement import versions

# What was measured and how fast it is, by name. Figures with a spread are `Spread`s,
# those that are not known None.
Row = Mapping[str, Any]

# Those that decide how fast a run is.
_PACKAGES = ("mixer-jax", "jax", "jaxlib", "numpy", "grain", "opencv-python-headless")


def machine() -> dict[str, Any]:
    """Returns the processor and the devices that are here."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": _cpu_model(),
        "cores": num_cores(),
        "device": device.device_kind,
        "devices": jax.device_count(),
        "device_memory_bytes": memory,  # None where JAX does not know it
    }


def _cpu_model() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # only Linux has it
        lines = []
    names = [x.partition(":")[2].strip() for x in lines if x.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def as_json(parts: Mapping[str, Sequence[Row]], **given: Any) -> dict[str, Any]:
    """Returns what is written to a file: each figure with versions and machine.

    Args:
      parts: rows by the name of the part that was measured.
      **given: what was asked for, such as the config.
    """
    return {
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "versions": versions(_PACKAGES),
        "machine": machine(),
        **given,
        "parts": {
            name: [{key: _plain(x) for key, x in row.items()} for row in rows]
            for name, rows in parts.items()
        },
    }


def _plain(value: Any) -> Any:
    return dataclasses.asdict(value) if isinstance(value, Spread) else value


def as_table(rows: Sequence[Row]) -> tuple[list[tuple[str, ...]], str]:
    """Returns the cells of a table with a heading, and the side of each column.

    Of a figure the table has the median, and in brackets the least and the most.
    """
    names = list(dict.fromkeys(name for row in rows for name in row))
    cells = [tuple(_cell(name, row.get(name)) for name in names) for row in rows]
    is_text = [all(isinstance(row.get(name), str) for row in rows) for name in names]
    align = "".join("<" if text else ">" for text in is_text)
    return [tuple(names), *cells], align


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Spread):
        least, most = _number(name, value.least), _number(name, value.most)
        return f"{_number(name, value.median)} ({least} to {most})"
    return value if isinstance(value, str) else _number(name, value)


def _number(name: str, value: float) -> str:
    if name.startswith("share"):
        return f"{value:.1%}"
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
