"""The examples of a run, and the transforms of their images."""

import contextlib
import dataclasses
import logging
from collections.abc import Sequence
from typing import Any

from jax.sharding import Mesh

from mixer_jax.data import dataset, pipeline, preprocess, splits
from mixer_jax.data.fingerprint import Fingerprint, fingerprint
from mixer_jax.data.names import printable
from mixer_jax.data.permute import create_permute
from mixer_jax.run.config import Config
from mixer_jax.training import sharding

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples of a run, and the transforms of their images.

    Attributes:
      config: of the run.
      class_names: of the labels.
      fingerprint: of the two splits; see mixer_jax.data.fingerprint.
      train_source: the examples to train on.
      test_source: the examples to test on.
      train_transform: from an image to what the model sees in training.
      eval_transform: from an image to what it sees in evaluation.
    """

    config: Config
    class_names: Sequence[str]
    fingerprint: Fingerprint
    train_source: dataset.Source
    test_source: dataset.Source
    train_transform: preprocess.TrainTransform
    eval_transform: preprocess.EvalTransform

    def train_batches(
        self, start_step: int, mesh: Mesh
    ) -> contextlib.AbstractContextManager[Any]:
        """Opens an iterator of this process's rows of training batches, without end."""
        batches = pipeline.train_batches(
            self.train_source,
            self.train_transform,
            batch_size=self.config.batch,
            seed=self.config.seed,
            start_step=start_step,
            prefetch=self.config.prefetch,
            rows=sharding.local_rows(mesh, self.config.batch),
        )
        return contextlib.closing(batches)


def open_data(config: Config) -> Data:
    """Returns the data that `config` describes.

    Raises:
      DatasetError: the dataset or a split is not there, or not as expected.
    """
    opened = dataset.open_dataset(
        config.dataset,
        data_dir=config.tfds_data_dir,
        manual_dir=config.tfds_manual_dir,
    )
    train_split, test_split = splits.choose_splits(
        config.dataset, opened, config.pp.train, config.pp.test
    )
    permute = create_permute(config.pp.permute, config.model.patches.size)
    data = Data(
        config,
        list(opened.class_names),
        fingerprint(opened, (train_split, test_split)),
        opened.split(train_split),
        opened.split(test_split),
        preprocess.TrainTransform(
            config.pp.crop,
            config.pp.area_range,
            config.pp.aspect_range,
            config.pp.flip,
            config.pp.transfer,
            config.pp.randaugment,
            permute,
        ),
        preprocess.EvalTransform(
            config.pp.crop,
            config.pp.evaluation,
            config.pp.resize,
            config.pp.transfer,
            permute,
        ),
    )
    if isinstance(data.train_source[0].label, tuple):
        raise dataset.DatasetError(
            f"{config.dataset} has several labels for an image; runs train on one."
        )
    splits.check_splits(opened, train_split, test_split)
    logger.info(
        "data     %s: %s images to train on (%s), %s to test on (%s), %d classes",
        printable(config.dataset),
        f"{len(data.train_source):,}",
        train_split,
        f"{len(data.test_source):,}",
        test_split,
        len(data.class_names),
    )
    return data
