"""Looks at every image of a dataset, so that a run meets no surprise."""

import concurrent.futures
import hashlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mixer_jax.data.dataset import Source
from mixer_jax.data.decode import ImageError
from mixer_jax.data.pipeline import NUM_THREADS

# What `warnings` finds worth one.
SMALL_PIXELS = 32
IMBALANCE = 20


class Checked(NamedTuple):
    """What was found out about one example.

    Attributes:
      split: that it is in.
      label: index into the dataset's class names.
      name: what to call it; the path of a file.
      width: in pixels; 0 if it cannot be read.
      height: in pixels; 0 if it cannot be read.
      digest: of its pixels, the same for equal images only.
      error: why it cannot be read.
    """

    split: str
    label: int
    name: str
    width: int = 0
    height: int = 0
    digest: bytes = b""
    error: str | None = None


def check_images(split: str, source: Source) -> Iterator[Checked]:
    """Reads every example of a split, in several threads, and gives them in order."""

    def check(index: int) -> Checked:
        example = source[index]
        assert isinstance(example.label, int), "one label for each image"
        try:
            image = example.pixels()
        except ImageError as error:
            return Checked(split, example.label, example.name, error=str(error))
        height, width = image.shape[:2]
        pixels = hashlib.blake2b(image.tobytes(), digest_size=16)
        pixels.update(f"{width} x {height}".encode())
        return Checked(
            split, example.label, example.name, width, height, pixels.digest()
        )

    with concurrent.futures.ThreadPoolExecutor(NUM_THREADS) as pool:
        for start in range(0, len(source), 1024):  # not a million futures at once
            yield from pool.map(check, range(len(source))[start : start + 1024])


def summarize(
    checked: Sequence[Checked], class_names: Sequence[str]
) -> list[tuple[str, ...]]:
    """Counts by split and class.

    Args:
      checked: examples of one or more splits.
      class_names: of the dataset.

    Returns:
      rows of a table, the first one its head: split, class, images that can be read,
      images that cannot, and the smallest and largest of the former as width x height.
      Of more than 50 classes there is one row a split.
    """
    rows: list[tuple[str, ...]] = [
        ("split", "class", "images", "unreadable", "smallest", "largest")
    ]
    splits: dict[str, dict[int, list[Checked]]] = defaultdict(lambda: defaultdict(list))
    for x in checked:
        splits[x.split][x.label].append(x)
    for split, classes in splits.items():
        everything = [x for label in sorted(classes) for x in classes[label]]
        if len(class_names) <= 50:
            for label, name in enumerate(class_names):
                rows.append((split, name, *_counts_and_sizes(classes.get(label, []))))
        rows.append((split, "all", *_counts_and_sizes(everything)))
    return rows


def warnings(checked: Sequence[Checked], class_names: Sequence[str]) -> list[str]:
    """Says what is odd about the images that can be read: one message a finding.

    These are images that are in several splits or classes, small images, and very
    uneven classes.
    """
    readable = [x for x in checked if x.error is None]
    copies: dict[bytes, list[Checked]] = defaultdict(list)
    for x in readable:
        copies[x.digest].append(x)
    repeated = [group for group in copies.values() if len(group) > 1]
    messages = []
    for groups, what in (
        (
            [g for g in repeated if len({x.split for x in g}) > 1],
            "images are in several splits, so that what is tested on was trained on",
        ),
        (
            [g for g in repeated if len({x.label for x in g}) > 1],
            "images are in several classes",
        ),
    ):
        if groups:
            shown = [" = ".join(x.name for x in group) for group in groups[:5]]
            shown += ["…"] * (len(groups) > 5)
            messages.append("\n  ".join([f"{len(groups):,} {what}:", *shown]))
    small = [x for x in readable if min(x.width, x.height) < SMALL_PIXELS]
    if small:
        messages.append(
            f"{len(small):,} images are less than {SMALL_PIXELS} pixels wide or high, "
            f"such as {small[0].name} ({small[0].width} x {small[0].height})"
        )
    for split in dict.fromkeys(x.split for x in readable):
        counts = Counter(x.label for x in readable if x.split == split)
        (most, high), (least, low) = counts.most_common()[0], counts.most_common()[-1]
        if high >= IMBALANCE * low:
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
