"""Accuracy, average precision and loss over every example of a split."""

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from mixer_jax.data.dataset import Dataset, DatasetError, Relabelled
from mixer_jax.data.imagenet import imagenet_synsets
from mixer_jax.data.names import listing
from mixer_jax.data.pipeline import eval_batches
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.data.workers import usual_workers
from mixer_jax.model import MlpMixer
from mixer_jax.training import losses, sharding
from mixer_jax.training.step import Batch, LossFn, make_eval_step
from mixer_jax.weights.layout import CheckpointError

logger = logging.getLogger(__name__)


def evaluate(
    eval_step: Callable[[Any, Batch], Any], params: Any, batches: Iterable[Batch]
) -> dict[str, float]:
    """Scores parameters on batches.

    Args:
      eval_step: see `mixer_jax.training.step.make_eval_step`.
      params: the parameters.
      batches: on the devices, of `image`, `label` and `mask`.

    Returns:
      `top1` and, of more than five classes, `top5` as fractions, the mean `loss`, and
      `count`, the examples that were scored. If all of several labels are to be found,
      `mAP` before these, the mean of `average_precisions` over the classes that some
      image has; and `top1` and `top5` are fractions of the images that have a label.

    Raises:
      DatasetError: there is nothing to score.
    """
    return _score(eval_step, params, batches)[0]


def _score(
    eval_step: Callable[[Any, Batch], Any], params: Any, batches: Iterable[Batch]
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns what `evaluate` does, and the joined `rows` of the steps, by name.

    Rows whose mask is 0 are left out.
    """
    totals: Counter[str] = Counter()
    rows: list[dict[str, np.ndarray]] = []
    running: dict[str, Any] | None = None

    def collect(sums: dict[str, Any] | None) -> None:
        for name, value in jax.device_get(sums or {}).items():
            if name == "rows":
                rows.append(value)
            else:
                totals[name] += value.item()

    for batch in batches:
        sums = eval_step(params, batch)
        collect(running)  # one batch late, while the device computes the next
        running = sums
    collect(running)
    count = totals["count"]
    labelled = totals.get("labelled", count)
    if labelled == 0:
        raise DatasetError(
            "None of the examples to evaluate on can be read and has a label."
        )
    joined = {
        key: np.concatenate([batch[key][batch["mask"] > 0] for batch in rows])
        for key in (rows[0] if rows else ())
    }
    metrics = {}
    if "logits" in joined:
        precisions = average_precisions(joined["logits"], joined["label"])
        metrics["mAP"] = float(np.nanmean(precisions))
    for name, over in ("top1", labelled), ("top5", labelled), ("loss", count):
        if name in totals:
            metrics[name] = totals[name] / over
    return metrics | {"count": count}, joined


def average_precisions(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Returns the average precision of each class, float64 [num_classes].

    Of a class it is the sum of (R_n - R_{n-1}) P_n over its scores as thresholds, from
    the highest: P_n and R_n are precision and recall of the images whose score is at
    least the n-th. Nothing is interpolated. Images of one score pass a threshold
    together, so it does not matter in which order they come.

    Args:
      scores: [images, num_classes], such as logits. A NaN counts as the lowest score.
      labels: [images, num_classes], above 0 for each class of an image.

    Returns:
      Numbers from 0 to 1; NaN for a class that no image has.
    """
    result = np.full(labels.shape[1], np.nan)
    scores = np.where(np.isnan(scores), -np.inf, scores)
    for i in np.flatnonzero((labels > 0).any(0)):
        order = np.argsort(-scores[:, i])
        score, is_hit = scores[order, i], labels[order, i] > 0
        last_of_score = np.flatnonzero(np.append(score[1:] != score[:-1], True))
        hits = np.cumsum(is_hit)[last_of_score]
        precision = hits / (last_of_score + 1)
        result[i] = np.sum(np.diff(hits, prepend=0) * precision) / hits[-1]
    return result


@dataclasses.dataclass(frozen=True)
class Report:
    """Labels and predictions of a split.

    Attributes:
      metrics: see `evaluate`.
      labels: int [count], the classes of the examples that could be read; if all of
        several are to be found, float [count, classes].
      predictions: int [count], the classes with the highest logits; the first of equal
        ones, and -1 where logits are NaN (see `mixer_jax.training.step.rank_labels`).
      class_names: names of the classes.
      average_precisions: of each class, if all of several labels are to be found.
    """

    metrics: dict[str, float]
    labels: np.ndarray
    predictions: np.ndarray
    class_names: Sequence[str]
    average_precisions: np.ndarray | None = None

    def confusion_matrix(self) -> np.ndarray:
        """Returns int [classes, classes]: examples by label and prediction.

        Examples with NaN logits, which have no prediction, are in none of the cells.

        Raises:
          DatasetError: images have several labels.
        """
        if self.average_precisions is not None:
            raise DatasetError(
                "Images have several labels: there is no confusion matrix of them."
            )
        n = len(self.class_names)
        cells = (self.labels * n + self.predictions)[self.predictions >= 0]
        return np.bincount(cells, minlength=n * n).reshape(n, n)

    def class_scores(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns, by class, the score (NaN without examples) and their number.

        The score is the average precision if there are any, else the accuracy.
        """
        if self.average_precisions is not None:
            return self.average_precisions, (self.labels > 0).sum(0)
        n = len(self.class_names)
        counts = np.bincount(self.labels, minlength=n)
        hits = np.bincount(self.labels[self.labels == self.predictions], minlength=n)
        return np.where(counts, hits / np.maximum(counts, 1), np.nan), counts

    def as_dict(self) -> dict[str, Any]:
        """Returns the metrics and, in `classes`, those of each class; fit for JSON."""
        scores, counts = self.class_scores()
        key = "top1" if self.average_precisions is None else "average_precision"
        rows = zip(self.class_names, scores.tolist(), counts.tolist(), strict=True)
        classes = [
            {"name": name, key: score if count else None, "count": count}
            for name, score, count in rows
        ]
        return {**self.metrics, "classes": classes}


def evaluate_dataset(
    model: MlpMixer,
    params: Any,
    transform: EvalTransform,
    dataset: Dataset,
    split: str,
    *,
    class_names: Sequence[str] | None = None,
    loss_fn: LossFn = losses.softmax_cross_entropy,
    multilabel: bool = False,
    batch_size: int = 128,
) -> Report:
    """Scores a model on a split of a dataset, over all of this host's devices.

    Labels are matched to the model's classes by name, so a dataset may have fewer
    classes or another order. WordNet ids will do as names of ImageNet-1k's classes.

    Args:
      model: the model.
      params: its parameters.
      transform: makes the images that the model expects.
      dataset: see `mixer_jax.data.dataset.open_dataset`.
      split: such as "test" or "validation[:1000]".
      class_names: names of the model's classes, if they are known.
      loss_fn: see `mixer_jax.training.losses`.
      multilabel: whether the model was trained to find all of several labels.
      batch_size: images at a time, rounded up to a multiple of the devices.

    Returns:
      The report.

    Raises:
      CheckpointError: the model has no head.
      DatasetError: the split does not exist; it has classes that the model does not
        have, no image that can be read and has a label, or several labels for an
        image where the model was trained on one.
    """
    if not model.num_classes:
        raise CheckpointError("The model has no head, and so nothing to score.")
    names, labels = _match_classes(class_names, model.num_classes, dataset.class_names)
    source = dataset.split(split)
    first = source[0].label
    if isinstance(first, tuple) and not multilabel:
        raise DatasetError(
            "Images of this dataset have several labels, and the model was trained on "
            "one for each image. Evaluate them in a run: see add_evaluator in "
            "configs/common.py."
        )
    if first == -1:
        raise DatasetError(f"The images of {split} have no labels to compare with.")
    source = Relabelled(source, labels)
    mesh = sharding.create_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    params = jax.device_put(params, sharding.replicated(mesh))
    step = jax.jit(
        make_eval_step(
            model,
            loss_fn,
            multilabel=multilabel,
            report=True,
            mean=transform.mean,
            std=transform.std,
        )
    )
    rows = eval_batches(
        source,
        transform,
        batch_size=batch_size,
        num_classes=model.num_classes if multilabel else None,
        multilabel=multilabel,
        workers=usual_workers(source, len(source)),
    )
    with contextlib.closing(rows):
        batches = (sharding.shard_batch(mesh, batch) for batch in rows)
        metrics, columns = _score(step, params, batches)
    labels, predictions = columns["label"], columns["prediction"]
    precisions = average_precisions(columns["logits"], labels) if multilabel else None
    return Report(metrics, labels, predictions, names, precisions)


def _match_classes(
    names: Sequence[str] | None, num_classes: int, dataset_names: Sequence[str]
) -> tuple[Sequence[str], np.ndarray]:
    """Returns the model's class names, and its class for each one of the dataset."""
    if names is None or list(names) == list(dataset_names):
        if len(dataset_names) != num_classes:
            raise DatasetError(
                f"The dataset has {len(dataset_names)} classes and the model, whose "
                f"classes have no names, {num_classes}. Name them (--class-names) to "
                "match classes by name."
            )
        if names is None:
            logger.warning(
                "The classes of the model have no names: the dataset's are taken in "
                "their order. --class-names gives them."
            )
        return dataset_names, np.arange(num_classes)
    known = {name: i for i, name in enumerate(names)}
    if names == list(imagenet_synsets().values()):
        known |= {synset: i for i, synset in enumerate(imagenet_synsets())}
    unknown = [name for name in dataset_names if name not in known]
    if unknown:
        raise DatasetError(
            f"The model has no class of the same name for {len(unknown)} of the "
            f"dataset's {len(dataset_names)} classes: {listing(unknown)}. The "
            f"model has {num_classes}: {listing(list(names))}. If its classes "
            "are called otherwise, give their names with --class-names."
        )
    return names, np.array([known[name] for name in dataset_names])
