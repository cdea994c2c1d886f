"""Reads every image of a dataset before a run does, and reports what is wrong."""

import concurrent.futures
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from mixer_jax.data.dataset import NO_LABEL, Source
from mixer_jax.data.decode import ImageError
from mixer_jax.data.pipeline import NUM_THREADS

# What `warnings` reports: images less wide or high than this many pixels, and classes
# with this many times as many images as the smallest.
SMALL_PIXELS = 32
IMBALANCE = 20

MAX_CLASSES = 50  # of which `summarize` gives a row each


class Checked(NamedTuple):
    """What was found out about one example.

    Attributes:
      split: the split that it is in.
      labels: indices into the dataset's class names; () if it has no label.
      name: identifies it in messages; the path of a file.
      width: in pixels; 0 if it cannot be read.
      height: in pixels; 0 if it cannot be read.
      digest: of its pixels; the same for equal images only.
      error: why it cannot be read; None if it can.
    """

    split: str
    labels: tuple[int, ...]
    name: str
    width: int = 0
    height: int = 0
    digest: bytes = b""
    error: str | None = None


def check_images(split: str, source: Source) -> Iterator[Checked]:
    """Reads every example of a split, in several threads, and gives them in order."""

    def check(index: int) -> Checked:
        example = source[index]
        labels, name = example.labels, example.name
        try:
            image = example.pixels()
        except ImageError as error:
            return Checked(split, labels, name, error=str(error))
        height, width = image.shape[:2]
        digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16)
        digest.update(f"{width} x {height}".encode())
        return Checked(split, labels, name, width, height, digest.digest())

    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(source), 1024):  # not a million futures at once
            yield from pool.map(check, range(len(source))[start : start + 1024])


def summarize(
    checked: Sequence[Checked], class_names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Counts images by split and class.

    Args:
      checked: examples of one or more splits.
      class_names: of the dataset.

    Returns:
      The rows of a table, the head first: split, class, number of images that can be
      read, number of those that cannot, and the smallest and the largest of the former
      as width x height. A split has a row for each class if there are at most
      MAX_CLASSES, one for images without a label if it has any, and one for all its
      images. An image with several labels is in the row of each.
    """
    rows: list[tuple[str, ...]] = [
        ("split", "class", "images", "unreadable", "smallest", "largest")
    ]
    splits: dict[str, list[Checked]] = defaultdict(list)
    for x in checked:
        splits[x.split].append(x)
    for split, members in splits.items():
        classes: dict[int | None, list[Checked]] = defaultdict(list)
        for x in members:
            for label in x.labels or (None,):
                classes[label].append(x)
        if len(class_names) <= MAX_CLASSES:
            for label, name in enumerate(class_names):
                rows.append((split, name, *_counts_and_sizes(classes[label])))
        if None in classes:
            rows.append((split, NO_LABEL, *_counts_and_sizes(classes[None])))
        rows.append((split, "all", *_counts_and_sizes(members)))
    return rows


def warnings(checked: Sequence[Checked], class_names: Sequence[str]) -> list[str]:
    """Returns a message for each kind of oddity of the images that can be read.

    These are images that are in several splits, equal images with different labels,
    small images, and classes of very different sizes.
    """
    readable = [x for x in checked if x.error is None]
    copies: dict[bytes, list[Checked]] = defaultdict(list)
    for x in readable:
        copies[x.digest].append(x)
    groups = [group for group in copies.values() if len(group) > 1]
    in_splits = [g for g in groups if len({x.split for x in g}) > 1]
    in_classes = [g for g in groups if len({x.labels for x in g if x.labels}) > 1]
    messages = []
    for found, what in (
        (in_splits, "images are in several splits; do not test on training images"),
        (in_classes, "images are in several classes"),
    ):
        if found:
            shown = [" = ".join(x.name for x in group) for group in found[:5]]
            shown += ["…"] * (len(found) > 5)
            messages.append("\n  ".join([f"{len(found):,} {what}:", *shown]))
    if len(class_names) < 2:
        messages.append(
            f"there is one class ({''.join(class_names)}), so nothing to learn; is the "
            "folder one level too high or too low?"
        )
    small = [x for x in readable if min(x.width, x.height) < SMALL_PIXELS]
    if small:
        messages.append(
            f"{len(small):,} images are less than {SMALL_PIXELS} pixels wide or high, "
            f"such as {small[0].name} ({small[0].width} x {small[0].height})"
        )
    counts: dict[str, Counter[int]] = defaultdict(Counter)
    for x in readable:
        counts[x.split].update(x.labels)
    for split, classes in counts.items():
        ordered = classes.most_common()
        if ordered and ordered[0][1] >= IMBALANCE * ordered[-1][1]:
            (most, high), (least, low) = ordered[0], ordered[-1]
            messages.append(
                f"classes of {split} are very uneven: {high:,} images of "
                f"{class_names[most]}, {low:,} of {class_names[least]}"
            )
    return messages


def _counts_and_sizes(checked: Sequence[Checked]) -> tuple[str, str, str, str]:
    readable = [x for x in checked if x.error is None]
    by_area = sorted(readable, key=lambda x: x.width * x.height)
    sizes = [f"{x.width} x {x.height}" for x in by_area[:1] + by_area[-1:]]
    smallest, largest = sizes or ("-", "-")
    unreadable = len(checked) - len(readable)
    return f"{len(readable):,}", f"{unreadable:,}", smallest, largest
