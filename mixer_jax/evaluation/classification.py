"""Accuracy and loss over every example of a split, of all classes and of each."""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from mixer_jax.data.dataset import Dataset, DatasetError, Example, Source
from mixer_jax.data.imagenet import imagenet_synsets
from mixer_jax.data.pipeline import eval_batches
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.model import MlpMixer
from mixer_jax.training import losses, sharding
from mixer_jax.training.step import (
    Batch,
    LossFn,
    Metrics,
    predict_classes,
    sum_scores,
    to_model_input,
)
from mixer_jax.weights.layout import CheckpointError


def evaluate(
    eval_step: Callable[[Any, Batch], Metrics], params: Any, batches: Iterable[Batch]
) -> dict[str, float]:
    """Scores parameters on batches.

    Args:
      eval_step: see `mixer_jax.training.step.make_eval_step`.
      params: the parameters.
      batches: on the devices, of `image`, `label` and `mask`.

    Returns:
      `top1` and, of more than five classes, `top5` as fractions, the mean `loss`, and
      `count`, the examples that were scored.

    Raises:
      DatasetError: there is nothing to score.
    """
    totals: Counter[str] = Counter()
    running: Metrics | None = None

    def collect(sums: Metrics | None) -> None:
        for name, value in jax.device_get(sums or {}).items():
            totals[name] += value.item()

    for batch in batches:
        sums = eval_step(params, batch)
        collect(running)  # one batch late, while the device computes the next
        running = sums
    collect(running)
    count = totals["count"]
    if count == 0:
        raise DatasetError(
            "None of the examples to evaluate on can be read and has a label."
        )
    names = [name for name in ("top1", "top5", "loss") if name in totals]
    return {name: totals[name] / count for name in names} | {"count": count}


@dataclasses.dataclass(frozen=True)
class Report:
    """Labels and predictions of a split.

    Attributes:
      metrics: see `evaluate`.
      labels: int [count], the classes of the examples that could be read.
      predictions: int [count], the classes with the highest logits; the first of equal
        ones, and -1 where logits are NaN (see `mixer_jax.training.step.rank_labels`).
      class_names: names of the classes.
    """

    metrics: dict[str, float]
    labels: np.ndarray
    predictions: np.ndarray
    class_names: Sequence[str]

    def confusion_matrix(self) -> np.ndarray:
        """Returns int [classes, classes]: examples by label and prediction.

        Examples with NaN logits, which have no prediction, are in none of the cells.
        """
        n = len(self.class_names)
        cells = (self.labels * n + self.predictions)[self.predictions >= 0]
        return np.bincount(cells, minlength=n * n).reshape(n, n)

    def class_accuracies(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns, by class, the accuracy (NaN without examples) and their number."""
        n = len(self.class_names)
        counts = np.bincount(self.labels, minlength=n)
        hits = np.bincount(self.labels[self.labels == self.predictions], minlength=n)
        return np.where(counts, hits / np.maximum(counts, 1), np.nan), counts

    def as_dict(self) -> dict[str, Any]:
        """Returns the metrics and, in `classes`, those of each class; fit for JSON."""
        accuracies, counts = self.class_accuracies()
        rows = zip(self.class_names, accuracies.tolist(), counts.tolist(), strict=True)
        classes = [
            {"name": name, "top1": top1 if count else None, "count": count}
            for name, top1, count in rows
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
      batch_size: images at a time, rounded up to a multiple of the devices.

    Returns:
      The report.

    Raises:
      CheckpointError: the model has no head.
      DatasetError: the split does not exist; it has classes that the model does not
        have, no or several labels for an image, or no image that can be read.
    """
    if not model.num_classes:
        raise CheckpointError("The model has no head, and so nothing to score.")
    names, labels = _match_classes(class_names, model.num_classes, dataset.class_names)
    source = dataset.split(split)
    first = source[0].label
    if isinstance(first, tuple):
        raise DatasetError(
            "Images of this dataset have several labels. Evaluate them in a run: see "
            "add_evaluator in configs/common.py."
        )
    if first < 0:
        raise DatasetError(f"The images of {split} have no labels to compare with.")
    source = _Relabelled(source, labels)
    mesh = sharding.create_mesh()
    batch_size = -(-batch_size // mesh.size) * mesh.size
    params = jax.device_put(params, sharding.replicated(mesh))
    step = jax.jit(make_report_step(model, loss_fn))
    rows = eval_batches(source, transform, batch_size=batch_size)
    kept: list[tuple[jax.Array, ...]] = []

    def keep_predictions(params: Any, batch: Batch) -> Metrics:
        sums, predictions = step(params, batch)
        kept.append((batch["label"], predictions, batch["mask"]))
        return sums

    with contextlib.closing(rows):
        batches = (sharding.shard_batch(mesh, batch) for batch in rows)
        metrics = evaluate(keep_predictions, params, batches)
    columns = zip(*jax.device_get(kept), strict=True)
    label, prediction, mask = (np.concatenate(column) for column in columns)
    read = mask > 0
    return Report(metrics, label[read], prediction[read], names)


def make_report_step(
    model: MlpMixer, loss_fn: LossFn
) -> Callable[[Any, Batch], tuple[Metrics, jax.Array]]:
    """Returns make_eval_step's function, with predictions, int [batch], as well."""

    def report_step(params: Any, batch: Batch) -> tuple[Metrics, jax.Array]:
        images = to_model_input(batch["image"])
        logits: Any = model.apply({"params": params}, images, train=False)
        return sum_scores(logits, batch, loss_fn), predict_classes(logits)

    return report_step


@dataclasses.dataclass(frozen=True)
class _Relabelled:
    """A source whose labels are replaced."""

    source: Source
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, index: int, /) -> Example:
        example = self.source[index]
        assert isinstance(example.label, int), "one label for each image"
        return example._replace(label=int(self.labels[example.label]))


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
        return dataset_names, np.arange(num_classes)
    known = {name: i for i, name in enumerate(names)}
    if names == list(imagenet_synsets().values()):
        known |= {synset: i for i, synset in enumerate(imagenet_synsets())}
    unknown = [name for name in dataset_names if name not in known]
    if unknown:
        raise DatasetError(
            f"The model has no class of the same name for {len(unknown)} of the "
            f"dataset's {len(dataset_names)} classes: {', '.join(unknown[:5])}, … The "
            f"model has {num_classes}: {', '.join(list(names)[:5])}, … If its classes "
            "are called otherwise, give their names with --class-names."
        )
    return names, np.array([known[name] for name in dataset_names])
