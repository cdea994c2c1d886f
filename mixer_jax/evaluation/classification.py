"""Accuracy and loss over every example of a split."""

from collections.abc import Callable, Iterable
from typing import Any

import jax

from mixer_jax.training.step import Batch, Metrics


def evaluate(
    eval_step: Callable[[Any, Batch], Metrics], params: Any, batches: Iterable[Batch]
) -> dict[str, float]:
    """Scores parameters on batches.

    Args:
      eval_step: see `mixer_jax.training.step.make_eval_step`.
      params: the parameters.
      batches: on the devices, of `image`, `label` and `mask`.

    Returns:
      `top1` and `top5` as fractions, the mean `loss`, and `count`, the examples that
      were scored.

    Raises:
      ValueError: there was nothing to score.
    """
    totals = {"top1": 0.0, "top5": 0.0, "loss": 0.0, "count": 0.0}
    running: Metrics | None = None

    def collect(sums: Metrics | None) -> None:
        for name, value in jax.device_get(sums or {}).items():
            totals[name] += float(value)

    for batch in batches:
        sums = eval_step(params, batch)
        collect(running)  # one batch late, while the device computes the next
        running = sums
    collect(running)
    count = totals["count"]
    if count == 0:
        raise ValueError("None of the examples to evaluate on could be read.")
    return {name: value / count for name, value in totals.items()} | {"count": count}
