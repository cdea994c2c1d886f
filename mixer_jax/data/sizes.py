"""Sizes of images: (height, width) in pixels, or one number for both."""

import re
from collections.abc import Sequence

Size = tuple[int, int]

# Of an image that is resized before it is cut, a side has at most so many pixels: as
# float32 it takes 200 MB.
MOST_RESIZED = 4096


def as_size(value: int | Sequence[int]) -> Size:
    """Returns (height, width) for that, or for one number that stands for both."""
    height, width = (value, value) if isinstance(value, int) else value
    return height, width


def size_text(value: int | Sequence[int]) -> str:
    """Returns a size as a text: "320x224"."""
    return "{}x{}".format(*as_size(value))


def as_value(size: Size) -> int | Size:
    """Returns one number for a square, as in a config; else the pair."""
    return size[0] if size[0] == size[1] else size


def is_size(text: str) -> bool:
    """Returns whether a text is one that `parse_size` takes."""
    return bool(re.fullmatch(r"\d+(x\d+)?", text))


def parse_size(text: str) -> Size:
    """Returns the size in a text such as "224" or "320x224" (height x width).

    Raises:
      ValueError: there is none in it.
    """
    if not is_size(text):
        raise ValueError(f"{text!r} is no size of images, such as 224 or 320x224.")
    height, _, width = text.partition("x")
    return int(height), int(width or height)


def covers(size: int | Sequence[int], part: int | Sequence[int]) -> bool:
    """Returns whether images of `size` are as high and as wide as `part`, or more."""
    return all(a >= b for a, b in zip(as_size(size), as_size(part), strict=True))


def fits_crop(size: int | Sequence[int], crop: int | Sequence[int]) -> bool:
    """Returns whether images may be resized to `size` to be cut to `crop`.

    `size` covers that, and has at most MOST_RESIZED pixels a side: a config.json must
    not make images that fit into no memory.
    """
    return covers(size, crop) and covers(MOST_RESIZED, size)


def in_proportion(size: Size, old: Size, new: Size) -> Size:
    """Returns `size` for images of another size: each side grows as theirs does."""
    height, width = (round(a * b / c) for a, b, c in zip(size, new, old, strict=True))
    return height, width
