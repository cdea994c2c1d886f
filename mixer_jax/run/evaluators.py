"""How a run scores its parameters: on the test split, and as config.evals says."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from mixer_jax.data import dataset as datasets
from mixer_jax.data import pipeline, preprocess
from mixer_jax.evaluation.classification import evaluate
from mixer_jax.evaluation.fewshot import extract_features, fewshot_accuracies
from mixer_jax.run.config import Config, ConfigError, evals
from mixer_jax.run.data import Data
from mixer_jax.run.program import Program
from mixer_jax.training import sharding


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One way to score parameters during a run.

    Attributes:
      name: of the numbers, as in "test/top1".
      every: steps between two evaluations.
      run: maps the parameters to numbers by name.
    """

    name: str
    every: int
    run: Callable[[Any], dict[str, float]]

    def is_due(self, step: int) -> bool:
        """Returns whether the parameters after `step` updates are to be scored."""
        return step > 0 and step % self.every == 0


def open_evaluators(
    config: Config, data: Data, program: Program, mesh: Mesh
) -> list[Evaluator]:
    """Returns the evaluator of the test split, and those that config.evals adds.

    Raises:
      ConfigError: an evaluator of the head has other classes than the run.
      DatasetError: its dataset or split is not there, or not as expected.
    """
    num_classes = len(data.class_names)

    def batches(
        source: datasets.Source,
        transform: preprocess.EvalTransform,
        several: int | None,
    ) -> Iterator[dict[str, jax.Array]]:
        # A split smaller than a batch is not padded to a whole one.
        smallest = -(-len(source) // mesh.size) * mesh.size
        batch_size = min(config.batch_eval, smallest)
        batches = pipeline.eval_batches(
            source,
            transform,
            batch_size=batch_size,
            num_classes=several,
            prefetch=config.prefetch,
            rows=sharding.local_rows(mesh, batch_size),
        )
        with contextlib.closing(batches):
            yield from (sharding.shard_batch(mesh, batch) for batch in batches)

    def classify(
        source: datasets.Source,
        transform: preprocess.EvalTransform,
        several: int | None,
        params: Any,
    ) -> dict[str, float]:
        return evaluate(program.eval_step, params, batches(source, transform, several))

    def probe(
        train: datasets.Source,
        test: datasets.Source,
        classes: int,
        shots: Sequence[int],
        transform: preprocess.EvalTransform,
        params: Any,
    ) -> dict[str, float]:
        train_features, test_features = (
            extract_features(program.feature_step, params, batches(x, transform, None))
            for x in (train, test)
        )
        accuracies = fewshot_accuracies(*train_features, *test_features, classes, shots)
        return {f"{shot}shot": accuracy for shot, accuracy in accuracies.items()}

    test = functools.partial(classify, data.test_source, data.eval_transform, None)
    evaluators = [Evaluator("test", config.eval_every, test)]
    for name, spec in evals(config).items():
        dataset = datasets.open_dataset(
            spec.dataset,
            data_dir=config.tfds_data_dir,
            manual_dir=config.tfds_manual_dir,
            label_key=spec.label_key,
        )
        transform = dataclasses.replace(
            data.eval_transform, evaluation=spec.evaluation, resize=spec.resize
        )
        source, classes = dataset.split(spec.split), len(dataset.class_names)
        if spec.type == "fewshot":
            train = dataset.split(spec.train_split)
            train = datasets.first_of_each_class(train, classes, max(spec.shots))
            run = functools.partial(
                probe, train, source, classes, spec.shots, transform
            )
        elif classes != num_classes:
            raise ConfigError(
                f"evals.{name} has {classes} classes, and the run {num_classes}: the "
                "head cannot be scored there. Take type fewshot, or another dataset."
            )
        else:
            several = classes if isinstance(source[0].label, tuple) else None
            run = functools.partial(classify, source, transform, several)
        evaluators.append(Evaluator(name, spec.every, run))
    return evaluators
