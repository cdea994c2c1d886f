"""Repeated measurements of calls that take turns."""

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

LEAST_REPEATS = 5  # fewer say nothing about the spread
LEAST_SECS = 0.2  # of a measurement; shorter calls are repeated within it


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of several measurements, and how far they lie apart."""

    median: float
    least: float
    most: float
    count: int

    @classmethod
    def of(cls, values: Iterable[float]) -> "Spread":
        """Returns the spread of at least one value."""
        found = sorted(values)
        return cls(statistics.median(found), found[0], found[-1], len(found))


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of a call, one number for each measurement."""

    secs: tuple[float, ...]
    cpu_secs: tuple[float, ...]  # of this process, over all its threads

    @property
    def spread(self) -> Spread:
        """Seconds of a call."""
        return Spread.of(self.secs)

    def per_sec(self, amount: float) -> Spread:
        """Returns `amount` by second, where a call does that amount."""
        return Spread.of(amount / secs for secs in self.secs)

    def over(self, other: "Timing") -> Spread:
        """Returns this time over another's.

        Measurements of one turn are compared: then the machine is equally busy.
        """
        return Spread.of(a / b for a, b in zip(self.secs, other.secs, strict=True))


def take_turns(
    calls: Mapping[str, Callable[[], Any]],
    wait: Callable[[Any], Any],
    repeats: int,
    least_secs: float = LEAST_SECS,
) -> dict[str, Timing]:
    """Measures calls one after the other, `repeats` times over.

    Args:
      calls: what to call, by name. Each is called once or more before it is measured,
        so what it compiles does not count.
      wait: waits for the result of a call, such as jax.block_until_ready. A call may
        return before its result is there.
      repeats: measurements of each.
      least_secs: what a measurement takes at the least. Shorter calls are repeated
        that often.
    """
    numbers, found = {}, {name: list[tuple[float, float]]() for name in calls}
    for name, call in calls.items():
        wait(call())
        numbers[name] = 1
        secs, _ = _measure(call, wait, 1)
        if secs < least_secs:  # not many, for the first estimate is a rough one
            secs, _ = _measure(call, wait, max(1, round(least_secs / 4 / secs)))
            numbers[name] = max(1, round(least_secs / secs))
    for _ in range(repeats):
        for name, call in calls.items():
            found[name].append(_measure(call, wait, numbers[name]))
    return {name: Timing(*zip(*pairs, strict=True)) for name, pairs in found.items()}


def _measure(
    call: Callable[[], Any], wait: Callable[[Any], Any], number: int
) -> tuple[float, float]:
    """Returns the seconds of a call and of processor time, as a mean of `number`.

    A result is waited for when the next call has been made, as a run reads its metrics.
    Virtual CPU devices that are many calls behind wait for each other for ever.
    """
    start, cpu_start = time.perf_counter(), time.process_time()
    result = call()
    for _ in range(number - 1):
        before, result = result, call()
        wait(before)
    wait(result)
    secs, cpu_secs = time.perf_counter() - start, time.process_time() - cpu_start
    return secs / number, cpu_secs / number
