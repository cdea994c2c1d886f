"""Damages files: at random, and at places that only who knows the format would find."""

import io
import json
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

# Integers at which sizes and offsets go wrong.
_INTEGERS = [0, 1, 2, -1, -2]
_INTEGERS += [2**n + d for n in (7, 8, 15, 16, 20, 31, 32, 63, 64) for d in (-1, 0)]

# Values for any place in a JSON text, as they stand there.
_JSON = [
    *("null", "true", "0", "1", "-1", "0.5", "1e999", "-1e999", "NaN", "-Infinity"),
    *("1e-320", str(2**31), str(2**63), str(2**64), "9" * 5000, "1." + "0" * 5000),
    *("[]", "{}", '""', '"x"', '" "', '"3"', "[0]", "[null]", "[[]]", '{"": 1}'),
    *('"../../../etc/passwd"', '"/etc/passwd"', '"/dev/zero"', '"gs://a/b"'),
    *(r'"\ud800"', r'"\u0000"', r'"\u001b[2J"', '"\ufeff"', f'"{"x" * 9000}"'),
    *("[" * 500 + "]" * 500, "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000),
    *("[0, 0, 0]", "[224, 224]", "[1e999, 1, 1]", "[" + "0, " * 9000 + "0]", "tru", ""),
]

# What is raised where a text or archive is too damaged by now for its own way.
_NOT_UNDERSTOOD = (ValueError, TypeError, LookupError, AttributeError, EOFError)
_NOT_UNDERSTOOD += (OSError, NotImplementedError, OverflowError, struct.error)
_NOT_UNDERSTOOD += (zipfile.BadZipFile, zipfile.LargeZipFile, zlib.error)


def mutate(rng: Random, data: bytes, suffix: str) -> bytes:
    """Returns other bytes for those of a sound file.

    Args:
      rng: chooses; the same state gives the same bytes.
      data: the file's.
      suffix: its ending, such as ".npz", which names its format.
    """
    aware = STRUCTURED.get(suffix)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 6])):
        use_aware = aware and rng.random() < 0.6
        operation = aware if use_aware and aware else rng.choice(_OPERATIONS)
        try:
            data = operation(rng, data)
        except _NOT_UNDERSTOOD:
            data = rng.choice(_OPERATIONS)(rng, data)
    return data


def _choose(rng: Random, options: Sequence[Any]) -> Any:
    if not options:  # which Hypothesis does not expect
        raise ValueError("there is nothing to change")
    return rng.choice(options)


def _place(rng: Random, data: bytes) -> int:
    """Returns an offset; every other time near one of the ends, where headers are."""
    near = min(len(data), 64)
    ranges = [(0, len(data)), (0, len(data)), (0, near), (len(data) - near, len(data))]
    return rng.randint(*rng.choice(ranges))


def _flip_bits(rng: Random, data: bytes) -> bytes:
    changed = bytearray(data or b"\0")
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        place = _place(rng, changed) % len(changed)
        changed[place] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut(rng: Random, data: bytes) -> bytes:
    return data[: _place(rng, data)]


def _drop(rng: Random, data: bytes) -> bytes:
    start = _place(rng, data)
    return data[:start] + data[start + rng.choice([1, 2, 4, 8, 100, 1000]) :]


def _repeat(rng: Random, data: bytes) -> bytes:
    start, size = _place(rng, data), rng.choice([1, 4, 16, 256, 4096])
    times = rng.choice([1, 2, 10, 1000 if size < 256 else 10])
    return data[: start + size] + data[start : start + size] * times + data[start:]


def _splice(rng: Random, data: bytes) -> bytes:
    start, end, to = (_place(rng, data) for _ in range(3))
    return data[:to] + data[start:end] + data[to:]


def _overwrite(rng: Random, data: bytes) -> bytes:
    start, size = _place(rng, data), rng.choice([1, 4, 64, 512])
    fill = [bytes(size), b"\xff" * size, bytes(rng.randrange(256) for _ in range(8))]
    return data[:start] + rng.choice(fill) + data[start + size :]


def _insert(rng: Random, data: bytes) -> bytes:
    texts = [b"\xef\xbb\xbf", b"\xff\xfe", b"\0", b"\n", b"\r\n", b'"', b",", b"\xe9"]
    start = rng.choice([0, _place(rng, data)])
    return data[:start] + rng.choice(texts) + data[start:]


def _write_integer(rng: Random, data: bytes) -> bytes:
    """Changes a number of 1 to 8 bytes, such as a length in a header."""
    start, size = _place(rng, data), rng.choice([1, 2, 4, 8])
    order: Any = rng.choice(["little", "big"])
    old = int.from_bytes(data[start : start + size], order)
    near = [old + 1, old - 1, old * 2, len(data), len(data) - start]
    value = rng.choice([*_INTEGERS, *near]) % 2 ** (8 * size)
    return data[:start] + value.to_bytes(size, order) + data[start + size :]


def _write_digits(rng: Random, data: bytes) -> bytes:
    """Changes a number that is written in digits, as in npy headers and CSV tables."""
    found = [m.span() for m in re.finditer(rb"\d+", data)]
    start, end = _choose(rng, found)
    more = ["1e9", "0x10", "", "1" * 400, "9" * 19, "-0", "1.5", "nan", "²", "٣"]
    text = rng.choice([*map(str, _INTEGERS), *more]).encode()
    return data[:start] + text + data[end:]


_OPERATIONS: list[Callable[[Random, bytes], bytes]] = [
    *(_flip_bits, _cut, _drop, _repeat, _splice, _overwrite, _insert, _write_integer),
]


def mutate_json(rng: Random, data: bytes) -> bytes:
    """Changes one place of a JSON text; it stays one, but for what _JSON puts there."""
    if data.count(b"[") + data.count(b"{") > 200:
        raise ValueError("this may be nested as deep as the stack is")
    root = [json.loads(data)]
    parents: list[Any] = []
    pending: list[Any] = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, dict | list) and node:
            parents.append(node)
            pending += node.values() if isinstance(node, dict) else node
    parent = _choose(rng, parents)
    keys = list(parent) if isinstance(parent, dict) else list(range(len(parent)))
    key, mark, text = rng.choice(keys), "\u0001mark\u0001", rng.choice(_JSON)
    other = _choose(rng, _choose(rng, [p for p in parents if isinstance(p, list)]))
    kind = rng.choice(["value", "value", "value", "drop", "other", "key", "wrap"])
    if kind == "value" or parent is root:
        parent[key] = mark
    elif kind == "drop":
        del parent[key]
    elif kind == "other":
        parent[key] = json.loads(json.dumps(other))
    elif kind == "wrap":
        parent[key] = [parent[key]]
    elif isinstance(parent, dict):
        name = rng.choice(["", "x", f"{key} ", f"{key}.{key}", "__class__", "../x"])
        parent[name] = parent.pop(key)
    else:
        parent += [parent[key]] * rng.choice([1, 1000])
    written = json.dumps(root[0], ensure_ascii=rng.random() < 0.5)
    return written.replace(json.dumps(mark), text).encode("utf-8", "surrogatepass")


def _mutate_line(rng: Random, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    i = _choose(rng, range(len(lines)))
    lines[i] = mutate_json(rng, lines[i]) + b"\n"
    return b"".join(lines)


def _mutate_safetensors(rng: Random, data: bytes) -> bytes:
    """Changes the header: a JSON text with its length before it."""
    (size,) = struct.unpack("<Q", data[:8])
    change = rng.choice([mutate_json, _write_digits])
    header = change(rng, data[8 : 8 + size])
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def _mutate_npz(rng: Random, data: bytes) -> bytes:
    """Changes a member or its name; the archive around it is sound."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    i = _choose(rng, range(len(members)))
    name, content = members[i]
    kind = rng.choice(["header", "header", "bytes", "name", "twice", "zeros", "drop"])
    if kind == "header":
        content = _write_digits(rng, content[:128]) + content[128:]
    elif kind == "bytes":
        content = rng.choice(_OPERATIONS)(rng, content)
    elif kind == "zeros":
        content += bytes(rng.choice([10, 10**4, 10**6]))
    elif kind == "twice":
        members.append((name, content))
    elif kind == "name":
        new = ["../x.npy", "/x.npy", "", "x", name[:-4], f"{name}.npy", f"a/{name}"]
        name = rng.choice([*new, name.replace("_0", f"_{rng.choice(_INTEGERS)}")])
    members[i : i + 1] = [] if kind == "drop" else [(name, content)]
    if rng.random() < 0.2:
        rng.shuffle(members)
    target = io.BytesIO()
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    with warnings.catch_warnings(), zipfile.ZipFile(target, "w", method) as archive:
        warnings.simplefilter("ignore")  # of names that are there twice
        for name, content in members:
            archive.writestr(zipfile.ZipInfo(name), content, method)
    return target.getvalue()


# What knows a format, by the ending of its files.
STRUCTURED: dict[str, Callable[[Random, bytes], bytes]] = {
    ".json": mutate_json,
    ".jsonl": _mutate_line,
    ".safetensors": _mutate_safetensors,
    ".npz": _mutate_npz,
    ".csv": _write_digits,
    ".tsv": _write_digits,
    ".txt": _write_digits,
}
