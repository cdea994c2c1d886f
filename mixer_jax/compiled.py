"""What XLA reports about a compiled program, and what its text tells besides."""

import collections
import dataclasses
import math
import re

import jax


@dataclasses.dataclass(frozen=True)
class Counts:
    """Work of one update on one chip.

    Attributes:
      flops: floating-point operations.
      bytes_accessed: bytes that its instructions read and write.
      sent_bytes: bytes sent to other chips, by kind of collective, if in rings.
    """

    flops: float
    bytes_accessed: float
    sent_bytes: dict[str, float]

    @classmethod
    def read(cls, compiled: jax.stages.Compiled, devices: int) -> "Counts":
        """Counts a program that so many devices run; the body of a loop, once."""
        cost = compiled.cost_analysis() or {}
        sent = read_collectives(compiled.as_text() or "", devices)
        return cls(cost["flops"], cost["bytes accessed"], sent)

    def plus(self, other: "Counts", times: float) -> "Counts":
        """Returns self + times * other."""
        kinds = self.sent_bytes | other.sent_bytes
        return Counts(
            self.flops + times * other.flops,
            self.bytes_accessed + times * other.bytes_accessed,
            {
                kind: self.sent_bytes.get(kind, 0.0)
                + times * other.sent_bytes.get(kind, 0.0)
                for kind in sorted(kinds)
            },
        )


# What libtpu says of a step too large; what it calls temporaries holds arguments too.
_OUT_OF_MEMORY = re.compile(
    r"(?:hbm\. Used |total memory required for HLO temporaries \()([\d.]+)([KMGT])"
)


def read_out_of_memory(message: str) -> int | None:
    """Returns the bytes that a step needs which XLA refused to compile for its size."""
    match = _OUT_OF_MEMORY.search(message)
    if "RESOURCE_EXHAUSTED" not in message or match is None:
        return None
    return int(float(match[1]) * 1024 ** (1 + "KMGT".index(match[2])))


_COLLECTIVE = re.compile(
    r"= (?P<shape>.*?) (?P<kind>all-reduce|all-gather|reduce-scatter|all-to-all|"
    r"collective-permute)(?P<start>-start)?\("
)


def read_collectives(hlo: str, devices: int) -> dict[str, float]:
    """Returns the bytes that a device sends, by kind of collective, in rings.

    Args:
      hlo: text of a compiled program for one device.
      devices: how many run it.
    """
    sent: dict[str, float] = collections.defaultdict(float)
    seen, computation = set(), ""
    for line in hlo.splitlines():
        if line.endswith("{") and not line.startswith(" "):
            computation = line
        match = _COLLECTIVE.search(line)
        if match is None:
            continue
        kind, channel = match["kind"], re.search(r"channel_id=(\d+)", line)
        key = channel[1] if channel else line
        if key in seen:  # a piece of one that runs beside other instructions
            continue
        seen.add(key)
        sizes = _array_bytes(match["shape"])
        if match["start"] and kind != "all-reduce":  # operands, results, signals
            sizes = sizes[1:2] if kind == "collective-permute" else sizes[-1:]
        n = _group_size(line, devices)
        if kind == "all-reduce" and "all-reduce-scatter" in computation:
            kind = "reduce-scatter"  # a fusion; the shape is the operand's
            sizes = [size / n for size in sizes]
        share = {
            "all-reduce": 2 * (n - 1) / n,
            "all-gather": (n - 1) / n,
            "reduce-scatter": n - 1,
            "all-to-all": (n - 1) / n,
            "collective-permute": 1,
        }[kind]
        sent[kind] += share * sum(sizes)
    return dict(sorted(sent.items()))


def _array_bytes(shape: str) -> list[float]:
    arrays = re.findall(r"\b(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]", shape)
    return [
        math.prod(int(size) for size in sizes.split(",") if size) * int(bits or 8) / 8
        for _, bits, sizes in arrays
    ]


def _group_size(line: str, devices: int) -> int:
    groups = line.partition("replica_groups=")[2]
    if match := re.match(r"\[\d+,(\d+)\]", groups):
        return int(match[1])
    if match := re.match(r"\{\{([\d,]+)\}", groups):
        return match[1].count(",") + 1
    if match := re.match(r"mesh\[(.*?)\].*?\{('.*?')\}", groups):
        axes = dict(re.findall(r"('\w+')=(\d+)", match[1]))
        return math.prod(int(axes[axis]) for axis in match[2].split(","))
    return devices
