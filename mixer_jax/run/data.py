"""The examples of a run, and the transforms of their images."""

import contextlib
import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from jax.sharding import Mesh

from mixer_jax.data import dataset, pipeline, preprocess, splits, workers
from mixer_jax.data.fingerprint import Fingerprint, fingerprint
from mixer_jax.data.listed import ListedDataset
from mixer_jax.data.names import printable
from mixer_jax.data.permute import create_permute
from mixer_jax.run.config import Config, ConfigError, evals, normalization
from mixer_jax.training import processes, sharding

logger = logging.getLogger(__name__)

DatasetKey = tuple[str, str | None]  # the name of a dataset, and its label_key


@dataclasses.dataclass(frozen=True)
class EvalData:
    """The examples of an evaluator that config.evals adds.

    Attributes:
      spec: of the evaluator, as `mixer_jax.run.config.evals` returns it.
      num_classes: of the dataset.
      source: the examples to score.
      train_source: few-shot: the examples of the probe.
    """

    spec: Config
    num_classes: int
    source: dataset.Source
    train_source: dataset.Source | None = None


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples of a run, and the transforms of their images.

    Attributes:
      config: of the run.
      class_names: of the labels.
      split_names: the splits to train and to test on, such as "train[:98%]".
      datasets: those that are open, by name and label_key.
      fingerprint: of the two splits, and of those of `evals`; see
        mixer_jax.data.fingerprint.
      multilabel: whether images have several labels.
      train_source: the examples to train on.
      test_source: the examples to test on.
      train_transform: from an image to what the model sees in training.
      eval_transform: from an image to what it sees in evaluation.
      evals: of the evaluators that config.evals adds, by name; see `open_evals`.
    """

    config: Config
    class_names: Sequence[str]
    split_names: tuple[str, str]
    datasets: Mapping[DatasetKey, dataset.Dataset]
    fingerprint: Fingerprint
    multilabel: bool
    train_source: dataset.Source
    test_source: dataset.Source
    train_transform: preprocess.TrainTransform
    eval_transform: preprocess.EvalTransform
    evals: Mapping[str, EvalData] = dataclasses.field(default_factory=dict)

    @property
    def missing(self) -> set[str]:
        """Paths of files that are listed, and could not be read at the start."""
        opened = self.datasets.values()
        listed = [found for found in opened if isinstance(found, ListedDataset)]
        return set().union(*(found.missing for found in listed))

    def train_batches(
        self, start_step: int, mesh: Mesh
    ) -> contextlib.AbstractContextManager[Any]:
        """Opens an iterator of this process's rows of training batches, without end.

        All processes call it.
        """
        rows = sharding.local_rows(mesh, self.config.batch)
        num_images = (self.config.total_steps - start_step) * len(rows)
        count = num_workers(self.config, self.train_source, num_images)
        if count:
            logger.info("workers  %d processes prepare the images", count)
        batches = pipeline.train_batches(
            self.train_source,
            self.train_transform,
            batch_size=self.config.batch,
            seed=self.config.seed,
            num_classes=len(self.class_names) if self.multilabel else None,
            start_step=start_step,
            prefetch=self.config.prefetch,
            rows=rows,
            split=self.split_names[0],
            missing=self.missing,
            workers=count,
        )
        return contextlib.closing(batches)


def num_workers(config: Config, source: dataset.Source, num_images: int) -> int:
    """Returns how many workers read `num_images` of a source in this process.

    All processes call it.
    """
    sharers = processes.count_on_host()
    if config.workers is not None:
        return config.workers
    return workers.usual_workers(source, num_images, sharers)


def open_data(config: Config) -> Data:
    """Returns the data that `config` describes, but for those of config.evals.

    Raises:
      DatasetError: the dataset or a split is not there, or not as expected; or images
        have several labels, and the loss takes one.
    """
    key = config.dataset, config.label_key
    opened = _open(config, *key)
    train_split, test_split = splits.choose_splits(
        config.dataset, opened, config.pp.train, config.pp.test
    )
    permute = create_permute(config.pp.permute, config.model.patches.size)
    train_source = opened.split(train_split)
    data = Data(
        config,
        list(opened.class_names),
        (train_split, test_split),
        {key: opened},
        fingerprint(opened, (train_split, test_split)),
        isinstance(train_source[0].label, tuple),
        train_source,
        opened.split(test_split),
        preprocess.TrainTransform(
            config.pp.crop,
            config.pp.area_range,
            config.pp.aspect_range,
            config.pp.flip,
            config.pp.transfer,
            config.pp.randaugment,
            permute,
            config.pp.interpolation,
            *normalization(config),
        ),
        preprocess.EvalTransform(
            config.pp.crop,
            config.pp.evaluation,
            config.pp.resize,
            config.pp.transfer,
            permute,
            config.pp.interpolation,
            *normalization(config),
        ),
    )
    if data.multilabel and config.loss != "sigmoid":
        hint = (
            " If a | in the table is part of a name, as in a|b, write a classes.txt "
            "beside the table that lists all classes, and a|b as one of them."
        )
        raise dataset.DatasetError(
            f"The images of {printable(config.dataset)} have several labels, but loss "
            f"is {config.loss}, which takes one. Set --config.loss=sigmoid."
            f"{hint if isinstance(opened, ListedDataset) else ''}"
        )
    splits.check_splits(opened, train_split, test_split)
    logger.info(
        "data     %s: %s images to train on (%s), %s to test on (%s), %d classes%s",
        printable(config.dataset),
        f"{len(data.train_source):,}",
        train_split,
        f"{len(data.test_source):,}",
        test_split,
        len(data.class_names),
        ", several labels an image" if data.multilabel else "",
    )
    return data


def open_evals(data: Data) -> Data:
    """Returns `data` with those of the evaluators that config.evals adds.

    Raises:
      DatasetError: a dataset or split is not there, or its images cannot be read or
        have no labels.
      ConfigError: an evaluator of the head has other classes than the run.
    """
    config, opened = data.config, {}
    datasets = dict(data.datasets)  # each is opened once, and warns once
    splits_of = dict(data.fingerprint["splits"])
    known = {
        (config.dataset, config.label_key, expression): digests
        for expression, digests in splits_of.items()
    }
    for name, spec in evals(config).items():
        key = f"config.evals.{name}"
        which = spec.dataset, spec.label_key
        if which not in datasets:
            with _named(f"{key}.dataset"):
                datasets[which] = _open(config, *which)
        found = datasets[which]
        num_classes = len(found.class_names)
        sources = []
        is_probe = spec.type == "fewshot"
        for part in ("split", "train_split") if is_probe else ("split",):
            with _named(f"{key}.{part}"):
                source = found.split(spec[part])
                splits.check_readable(found.name, source)
                if part == "train_split":
                    source = dataset.first_of_each_class(
                        source, num_classes, max(spec.shots)
                    )
                sources.append(source)
                examples = (*which, spec[part])
                if examples not in known:
                    one = fingerprint(found, [spec[part]])
                    known[examples] = one["splits"][spec[part]]
                splits_of[f"{key}.{part}"] = known[examples]
        if not is_probe and num_classes != len(data.class_names):
            raise ConfigError(
                f"{key}.dataset has {num_classes} classes, and the run "
                f"{len(data.class_names)}: the head cannot be scored there. Take type "
                "fewshot, or another dataset."
            )
        if not is_probe:
            _warn_of_other_names(key, found.class_names, data.class_names)
        opened[name] = EvalData(spec, num_classes, *sources)
    return dataclasses.replace(
        data,
        datasets=datasets,
        fingerprint=data.fingerprint | {"splits": splits_of},
        evals=opened,
    )


def _open(config: Config, name: str, label_key: str | None) -> dataset.Dataset:
    return dataset.open_dataset(
        name,
        data_dir=config.tfds_data_dir,
        manual_dir=config.tfds_manual_dir,
        label_key=label_key,
    )


def _warn_of_other_names(key: str, names: Sequence[str], known: Sequence[str]) -> None:
    pairs = [pair for pair in zip(names, known, strict=True) if pair[0] != pair[1]]
    if pairs:
        logger.warning(
            "%s.dataset calls %d classes otherwise than the run does, such as %r for "
            "%r; labels are compared by their numbers",
            key,
            len(pairs),
            *pairs[0],
        )


@contextlib.contextmanager
def _named(key: str) -> Iterator[None]:
    """Puts the key of a config before the message of a DatasetError."""
    try:
        yield
    except dataset.DatasetError as error:
        raise dataset.DatasetError(f"{key}: {error}") from error
