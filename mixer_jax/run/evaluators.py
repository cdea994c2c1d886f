"""How a run scores its parameters: on the test split, and as config.evals says."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from mixer_jax.data import pipeline, preprocess
from mixer_jax.data.dataset import Source
from mixer_jax.data.workers import MIN_IMAGES
from mixer_jax.evaluation.classification import evaluate
from mixer_jax.evaluation.fewshot import extract_features, fewshot_accuracies
from mixer_jax.run.config import Config
from mixer_jax.run.data import Data, num_workers
from mixer_jax.run.program import Program
from mixer_jax.training import sharding


class EvaluationStopped(Exception):  # noqa: N818 - it is no error
    """A request to stop the run came within an evaluation; the argument is why."""


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One way to score parameters during a run.

    Attributes:
      name: of the numbers, as in "test/top1".
      every: steps between two evaluations.
      run: maps the parameters to numbers by name; or raises EvaluationStopped.
    """

    name: str
    every: int
    run: Callable[[Any], dict[str, float]]

    def is_due(self, step: int) -> bool:
        """Returns whether the parameters after `step` updates are to be scored."""
        return step > 0 and step % self.every == 0


def open_evaluators(
    config: Config,
    data: Data,
    program: Program,
    mesh: Mesh,
    stop_requested: Callable[[], str] = lambda: "",
) -> list[Evaluator]:
    """Returns the evaluator of the test split, and those that config.evals adds.

    Args:
      config: of the run.
      data: of the run.
      program: of the run.
      mesh: of the run.
      stop_requested: asked before each batch, in all processes, why the run is to stop.
    """

    def batches(
        source: Source,
        split: str,
        transform: preprocess.EvalTransform,
        several: int | None,
    ) -> Iterator[dict[str, jax.Array]]:
        # A split smaller than a batch is not padded to a whole one.
        smallest = -(-len(source) // mesh.size) * mesh.size
        batch_size = min(config.batch_eval, smallest)
        rows = sharding.local_rows(mesh, batch_size)
        num_images = len(source) * len(rows) // batch_size
        workers = num_workers(config, source, num_images)  # all processes ask
        if num_images < MIN_IMAGES:  # it takes no longer than their start
            workers = 0
        batches = pipeline.eval_batches(
            source,
            transform,
            batch_size=batch_size,
            num_classes=several,
            multilabel=data.multilabel,
            prefetch=config.prefetch,
            rows=rows,
            split=split,
            missing=data.missing,
            workers=workers,
        )
        with contextlib.closing(batches):
            for batch in batches:
                if reason := stop_requested():
                    raise EvaluationStopped(reason)
                yield sharding.shard_batch(mesh, batch)

    def classify(
        source: Source, split: str, transform: preprocess.EvalTransform, params: Any
    ) -> dict[str, float]:
        several = data.multilabel or isinstance(source[0].label, tuple)
        num_classes = len(data.class_names) if several else None
        rows = batches(source, split, transform, num_classes)
        return evaluate(program.eval_step, params, rows)

    def probe(
        train: Source,
        test: Source,
        spec: Config,
        classes: int,
        transform: preprocess.EvalTransform,
        params: Any,
    ) -> dict[str, float]:
        train_features, test_features = (
            extract_features(
                program.feature_step, params, batches(source, split, transform, None)
            )
            for source, split in ((train, spec.train_split), (test, spec.split))
        )
        accuracies = fewshot_accuracies(
            *train_features, *test_features, classes, spec.shots
        )
        return {f"{shot}shot": accuracy for shot, accuracy in accuracies.items()}

    test = functools.partial(
        classify, data.test_source, data.split_names[1], data.eval_transform
    )
    evaluators = [Evaluator("test", config.eval_every, test)]
    for name, found in data.evals.items():
        spec = found.spec
        transform = dataclasses.replace(
            data.eval_transform, evaluation=spec.evaluation, resize=spec.resize
        )
        if found.train_source is None:
            run = functools.partial(classify, found.source, spec.split, transform)
        else:
            run = functools.partial(
                probe,
                found.train_source,
                found.source,
                spec,
                found.num_classes,
                transform,
            )
        evaluators.append(Evaluator(name, spec.every, run))
    return evaluators
