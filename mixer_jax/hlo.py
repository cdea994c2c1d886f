"""What a compiled program moves, read from its text (XLA's HLO).

XLA's own figure, "bytes accessed", is no measure of a TPU's memory. It counts arrays in
the fast memory on the chip as well, and a copy into it at its start and at its end.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

# An array in the text, such as bf16[64,196,3072]{2,1,0:T(8,128)(2,1)S(1)}.
_ARRAY = re.compile(r"\b([a-z]+\d*)\w*\[([\d,]*)\](?:\{([^}]*)\})?")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (.*?) ([a-z][a-z\-\d]*)\((.*)")
_COMPUTATION = re.compile(r"(ENTRY )?%([\w.\-]+) \(.*\{$")
_CALLED = re.compile(r"(?:body|calls|to_apply|\w+_computation)=%([\w.\-]+)")

# Names for arrays and for parts of them: nothing is moved.
_NAMES = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}
_NAMING_CALLS = ('custom_call_target="AllocateBuffer"', "ConcatBitcast")
# What runs other computations of the text.
_CALLS = {"while", "call", "conditional", "async-start"}

# How much of the whole array each chip of a group of g chips must send or receive at
# least, in units of (g - 1) / g.
_COLLECTIVES = {
    "all-gather": 1,
    "reduce-scatter": 1,
    "all-to-all": 1,
    "all-reduce": 2,
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one chip moves in a program. The body of a loop counts once."""

    memory_bytes: int  # between its memory and its units, or the memory on the chip
    network_bytes: int  # that collectives send and receive, each way


@dataclasses.dataclass(frozen=True)
class _Instruction:
    name: str
    result: str  # the text of its arrays
    op: str
    rest: str  # operands and attributes

    @property
    def operands(self) -> list[str]:
        return re.findall(r"%([\w.\-]+)", self.rest.split(")")[0])


def count_traffic(text: str) -> Traffic:
    """Counts what a compiled program moves.

    An instruction reads its operands and writes its results, a fusion only those of the
    whole. What lies in a memory space of its own, such as S(1), a TPU's memory on the
    chip, is not counted (https://openxla.org/xla/shapes).

    Args:
      text: of the program, from `jax.stages.Compiled.as_text`.

    Raises:
      ValueError: it is something else.
    """
    computations: dict[str, list[_Instruction]] = {}
    entry = name = ""
    for line in text.splitlines():
        if found := _COMPUTATION.match(line):
            name = found[2]
            computations[name] = []
            entry = name if found[1] else entry
        elif found := _INSTRUCTION.match(line):
            computations[name].append(_Instruction(*found.groups()))
    if not entry:
        raise ValueError(f"This is no text of a program in HLO: {text[:80]!r}")
    run = [x for called in _run(entry, computations) for x in computations[called]]
    results = {x.name: x.result for x in run}
    found = re.search(r"num_partitions=(\d+)", text.partition("\n")[0])
    partitions = int(found[1]) if found else 1
    # A collective that runs beside computations stands in each of their fusions.
    sent = {
        (
            x.op,
            x.rest.partition("channel_id=")[2].partition(",")[0],
            _without_layouts(x.result),
        ): (
            _network_bytes(
                x, partitions, scatters=name.startswith("all-reduce-scatter")
            )
        )
        for name, instructions in computations.items()
        for x in instructions
    }
    return Traffic(
        sum(_memory_bytes(x, results) for x in run), round(sum(sent.values()))
    )


def _without_layouts(result: str) -> str:
    return re.sub(r"\{[^}]*\}", "", result)


def _run(name: str, computations: dict[str, list[_Instruction]]) -> Iterator[str]:
    """Yields the computations that are run, not those that a fusion holds."""
    yield name
    for x in computations[name]:
        if x.op in _CALLS:
            for called in _CALLED.findall(x.rest):
                yield from _run(called, computations)


def _size(text: str, *, any_memory: bool = False) -> int:
    """Returns the bytes of the arrays in a text; by default of those in main memory."""
    total = 0
    for dtype, shape, layout in _ARRAY.findall(text):
        bits = re.search(r"\d+$", dtype)
        if any_memory or "S(" not in layout:
            elements = math.prod(int(x) for x in shape.split(",") if x)
            total += elements * (max(int(bits[0]), 8) // 8 if bits else 1)
    return total


def _memory_bytes(x: _Instruction, results: dict[str, str]) -> int:
    if x.op in _NAMES | _CALLS or x.op.endswith("-done"):
        return 0
    if x.op == "custom-call" and any(name in x.rest for name in _NAMING_CALLS):
        return 0
    if x.op == "copy-start":  # its result names both places
        return _size(x.result)
    if x.op == "slice-start":  # ((from), to, …); a slice has the size of where it goes
        source, _, rest = x.result.partition("), ")
        to = next(_ARRAY.finditer(rest))[0]
        return _size(to, any_memory=True) * (_size(source) > 0) + _size(to)
    return _size(x.result) + sum(_size(results.get(name, "")) for name in x.operands)


def _network_bytes(x: _Instruction, partitions: int, scatters: bool) -> float:
    """Returns what each chip sends; `scatters` if it then drops others' parts."""
    op = x.op.removesuffix("-start")
    if op == "collective-permute":
        return _size(next(_ARRAY.finditer(x.result))[0], any_memory=True)
    if op not in _COLLECTIVES:
        return 0
    group = _group_size(x.rest, partitions)
    whole = _size(x.result, any_memory=True)
    if op == "reduce-scatter":  # the result is one chip's part
        whole *= group
    elif op == "all-gather" and x.op.endswith("-start"):  # (parts, whole)
        whole = whole * group // (group + 1)
    times = 1 if scatters else _COLLECTIVES[op]
    return times * whole * (group - 1) / group


def _group_size(attributes: str, partitions: int) -> int:
    """Returns how many chips one collective joins, of all `partitions`."""
    groups = attributes.partition("replica_groups=")[2]
    if found := re.match(r"\[\d+,(\d+)\]", groups):  # [groups,size]<=[…]
        return int(found[1])
    if found := re.match(r"\{\{([\d,]*)\}", groups):  # {{0,1},{2,3}}
        return found[1].count(",") + 1
    # mesh['a'=2,'b'=4], … {'b'}; a part of an axis is 'b':(before)size
    if found := re.match(r"mesh\[(.*?)\][^{]*\{(.*?)\}", groups):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", found[1]))
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return partitions
