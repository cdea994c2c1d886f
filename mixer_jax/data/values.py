"""Whether values from a file or a flag, of any type, are what is expected there."""

import math
import re
from typing import Any

from mixer_jax.data.names import SURROGATES


def is_whole(x: Any, low: float = -math.inf) -> bool:
    """Returns whether a value is a whole number, at least `low`."""
    return isinstance(x, int) and not isinstance(x, bool) and x >= low


def is_number(x: Any, low: float = -math.inf) -> bool:
    """Returns whether a value is a number that is finite as a float, at least `low`."""
    number = isinstance(x, int | float) and not isinstance(x, bool)
    return number and abs(x) < 1e300 and x >= low


def is_pair(x: Any) -> bool:
    """Returns whether a value is a list or tuple of two."""
    return isinstance(x, tuple | list) and len(x) == 2


def is_size(x: Any, low: int) -> bool:
    """Returns whether a value is a size of images: a whole number, or a pair of them.

    They are at least `low`, and below 2**31.
    """
    sides = x if is_pair(x) else [x]
    return all(is_whole(side, low) and side < 2**31 for side in sides)


def is_color(x: Any, low: float) -> bool:
    """Returns whether a value is a number from `low` to 1, or three of them."""
    numbers = x if isinstance(x, tuple | list) else 3 * [x]
    return len(numbers) == 3 and all(is_number(n, low) and n <= 1 for n in numbers)


def is_std(x: Any) -> bool:
    """Returns whether a value is a standard deviation of pixels from 0 to 1."""
    return is_color(x, math.ulp(0))


def is_epsilon(x: Any) -> bool:
    """Returns whether a value is an epsilon of LayerNorm."""
    return is_number(x, 0)


def are_names(x: Any) -> bool:
    """Returns whether a value is a list of names of classes, of which any may be ""."""
    return isinstance(x, list) and all(map(is_text, x))


def is_name(x: Any) -> bool:
    """Returns whether a value is a text, and not blank."""
    return is_text(x) and bool(x.strip())


def is_text(x: Any) -> bool:
    """Returns whether a value is a text without lone surrogates."""
    return isinstance(x, str) and not re.search(SURROGATES, x)
