"""Whether a dataset is still the same: a few digests for perhaps a million files."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

from mixer_jax.data.dataset import Dataset
from mixer_jax.data.splits import count_parts
from mixer_jax.data.values import is_whole

Fingerprint = dict[str, Any]


def fingerprint(dataset: Dataset, expressions: Iterable[str] = ()) -> Fingerprint:
    """Returns what tells a dataset from another one, fit for JSON.

    Of files it takes the names below the dataset's folder, the order, the labels, the
    sizes in bytes and, of up to a thousand evenly spread ones, 4 kB; of images in
    memory the pixels; of a dataset of TensorFlow Datasets the version and the sizes of
    its splits. So it does not depend on where a folder lies, nor on the machine. It may
    not see a file whose contents change and whose size does not.

    Args:
      dataset: see `open_dataset`.
      expressions: splits such as "train[:90%]"; none for all whole splits.

    Returns:
      `classes`, with `count` and `names`, a digest; and `splits`, which has for each
      expression `count` and a digest of each column, such as `names`, `labels` and
      `sizes`.
    """
    names = dataset.class_names
    splits = {}
    for expression in expressions or dataset.split_names:
        columns = dataset.columns(expression)
        count = count_parts(dataset.parts(expression))
        splits[expression] = {"count": count} | {
            key: _digest(values) for key, values in columns.items()
        }
    classes = {"count": len(names), "names": _digest(x.encode() for x in names)}
    return {"classes": classes, "splits": splits}


def is_fingerprint(x: Any) -> bool:
    """Returns whether a value from a file is what `fingerprint` returns."""
    if not isinstance(x, dict) or not isinstance(x.get("splits"), dict):
        return False
    parts = [x.get("classes"), *x["splits"].values()]
    return all(isinstance(y, dict) and is_whole(y.get("count"), 0) for y in parts)


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Returns a line for each difference of two fingerprints; [] if they are equal."""
    lines = _changes("classes", before["classes"], after["classes"])
    old, new = before["splits"], after["splits"]
    for expression in dict.fromkeys((*old, *new)):
        if expression not in old or expression not in new:
            lines.append(f"{expression}: {'new' if expression in new else 'gone'}")
        else:
            lines += _changes(expression, old[expression], new[expression])
    return lines


def _changes(what: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    unit = "classes" if what == "classes" else "images"
    if old["count"] != new["count"]:
        return [f"{what}: {old['count']:,} {unit} before, {new['count']:,} now"]
    different = [
        key for key in dict.fromkeys((*old, *new)) if old.get(key) != new.get(key)
    ]
    if not different:
        return []
    return [
        f"{what}: {new['count']:,} {unit} as before, with other {', '.join(different)}"
    ]


def _digest(values: Iterable[bytes]) -> str:
    """Returns the digest of a sequence of bytes; the lengths count as well."""
    digest = hashlib.blake2b(digest_size=16)
    for value in values:
        digest.update(len(value).to_bytes(8, "little"))
        digest.update(value)
    return digest.hexdigest()
