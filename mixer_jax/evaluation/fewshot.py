"""The few-shot probe: a linear classifier on features of a few examples per class.

As in the paper (section 3) and in big_vision's `fewshot_lsr`, but in float64.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np
from numpy.typing import ArrayLike

from mixer_jax.training.step import Batch

# Of the constant feature: so large that the bias is hardly regularised.
BIAS_SCALE = 100.0


def extract_features(
    feature_step: Callable[[Any, Batch], Batch], params: Any, batches: Iterable[Batch]
) -> tuple[np.ndarray, np.ndarray]:
    """Returns pre_logits float32 [examples, dim] and labels int [examples].

    Args:
      feature_step: see `mixer_jax.training.step.make_feature_step`.
      params: the parameters.
      batches: on the devices, of `image`, `label` and `mask`.
    """
    rows = [jax.device_get(feature_step(params, batch)) for batch in batches]
    features, labels, mask = (
        np.concatenate([row[key] for row in rows])
        for key in ("feature", "label", "mask")
    )
    return features[mask > 0], labels[mask > 0]


def fewshot_accuracies(
    train_features: ArrayLike,
    train_labels: ArrayLike,
    test_features: ArrayLike,
    test_labels: ArrayLike,
    num_classes: int,
    shots: Sequence[int] = (1, 5, 10, 25),
    l2_reg: float = 2.0**10,
) -> dict[int, float]:
    """Top-1 accuracies on test data of probes that saw a few examples per class.

    The examples are the first k of each class, or all of a class that has fewer. To
    average over draws, as big_vision does over three, call with the training examples
    in several orders.

    Args:
      train_features: [train, dim], a model's pre_logits.
      train_labels: [train], integers from 0 to num_classes - 1.
      test_features: [test, dim].
      test_labels: [test].
      num_classes: number of classes.
      shots: the numbers k of examples per class.
      l2_reg: weight of the squared norm of the probe's weights.

    Returns:
      For each k of shots a fraction of the test examples, from 0 to 1.

    Raises:
      ValueError: features and labels do not fit one another, a label is not a class,
        a class has no training example, or k is not positive.
    """
    train_features, train_labels = _check("train", train_features, train_labels)
    test_features, test_labels = _check("test", test_features, test_labels)
    if train_features.shape[1] != test_features.shape[1]:
        raise ValueError(
            f"Training features have {train_features.shape[1]} dimensions and test "
            f"features {test_features.shape[1]}. Take both from the same model."
        )
    for name, labels in ("train", train_labels), ("test", test_labels):
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(
                f"{name}_labels are from {labels.min()} to {labels.max()}, but "
                f"num_classes={num_classes} allows 0 to {num_classes - 1}."
            )
    counts = np.bincount(train_labels, minlength=num_classes)
    if not counts.all():
        raise ValueError(
            f"Of {num_classes} classes, {np.flatnonzero(counts == 0).tolist()} have no "
            "training example. Give at least one of each, better max(shots)."
        )
    if min(shots, default=1) < 1:
        raise ValueError(f"shots={tuple(shots)}, but each must be 1 or more.")

    by_class = np.argsort(train_labels, kind="stable")
    first = np.repeat(np.cumsum(counts) - counts, counts)
    rank = np.arange(len(by_class)) - first  # of by_class, within its class
    accuracies = {}
    for k in shots:
        chosen = by_class[rank < k]
        weights, bias = fit_probe(
            train_features[chosen], train_labels[chosen], num_classes, l2_reg
        )
        predictions = np.argmax(test_features @ weights + bias, axis=1)
        accuracies[k] = float(np.mean(predictions == test_labels))
    return accuracies


def fit_probe(
    features: np.ndarray, labels: np.ndarray, num_classes: int, l2_reg: float
) -> tuple[np.ndarray, np.ndarray]:
    """Fits the linear probe; its scores are features @ weights + bias.

    Features are whitened, each to mean 0 and standard deviation 1, and joined by a
    constant feature 100 for the bias; the targets are 1 for the class and -1 for all
    others. All weights are regularised, that of the constant feature as well.

    Args:
      features: [examples, dim], in float64.
      labels: [examples], integers from 0 to num_classes - 1.
      num_classes: number of classes.
      l2_reg: weight of the squared norm.

    Returns:
      weights [dim, num_classes] and bias [num_classes], for features as they are, not
      whitened.
    """
    mean = features.mean(0)
    std = features.std(0) + 1e-5  # a feature may be constant
    whitened = (features - mean) / std
    whitened = np.pad(whitened, ((0, 0), (0, 1)), constant_values=BIAS_SCALE)
    targets = 2.0 * np.eye(num_classes)[labels] - 1.0
    solution = solve_least_squares(whitened, targets, l2_reg)
    weights = solution[:-1] / std[:, None]
    return weights, BIAS_SCALE * solution[-1] - mean @ weights


def solve_least_squares(
    features: np.ndarray, targets: np.ndarray, l2_reg: float
) -> np.ndarray:
    """Returns the W that minimises |features W - targets|² + l2_reg |W|².

    Of the two closed forms, which are equal, the one with the smaller matrix.

    Args:
      features: [examples, dim].
      targets: [examples, outputs].
      l2_reg: above 0.

    Returns:
      [dim, outputs].
    """
    examples, dim = features.shape
    if examples >= dim:
        gram = features.T @ features + l2_reg * np.eye(dim)
        return np.linalg.solve(gram, features.T @ targets)
    gram = features @ features.T + l2_reg * np.eye(examples)
    return features.T @ np.linalg.solve(gram, targets)


def _check(
    name: str, features: ArrayLike, labels: ArrayLike
) -> tuple[np.ndarray, np.ndarray]:
    features, labels = np.asarray(features, np.float64), np.asarray(labels)
    if (
        features.ndim != 2
        or labels.shape != features.shape[:1]
        or not np.issubdtype(labels.dtype, np.integer)
        or not len(labels)
    ):
        raise ValueError(
            f"{name}_features have shape {features.shape}, and {name}_labels shape "
            f"{labels.shape} in {labels.dtype}. Expected are [examples, dim] and "
            "integer [examples], and at least one example."
        )
    return features, labels
