"""Datasets of TensorFlow Datasets, read without TensorFlow."""

import dataclasses
import difflib
import importlib.util
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixer_jax.data.dataset import DatasetError, Example, Source

logger = logging.getLogger(__name__)


class TfdsDataset:
    """Any image classification dataset of TensorFlow Datasets.

    Downloading and preparing one needs TensorFlow, once. Reading it does not.

    Args:
      name: of the dataset, such as "cifar10" or "cifar10:3.0.2".
      data_dir: where prepared datasets are; None for ~/tensorflow_datasets.
      manual_dir: where files are that must be downloaded by hand.
      label_key: see `open_dataset`.

    Raises:
      DatasetError: there is no such dataset, it has no images with classes, or it must
        be prepared and TensorFlow is not installed.
    """

    def __init__(
        self,
        name: str,
        data_dir: str | None,
        manual_dir: str | None,
        label_key: str | None,
    ):
        import tensorflow_datasets as tfds  # half a second; only needed here

        self.name = name
        self._tfds = tfds
        try:
            self._builder = tfds.builder(
                name, data_dir=data_dir, file_format="array_record"
            )
        except tfds.core.DatasetNotFoundError as error:
            known = tfds.list_builders(with_community_datasets=False)
            raise DatasetError(_unknown_dataset(name, known)) from error
        except ImportError as error:
            raise DatasetError(_needs_tensorflow(name, data_dir)) from error
        if not self._builder.is_prepared():
            if importlib.util.find_spec("tensorflow") is None:
                raise DatasetError(_needs_tensorflow(name, self._builder.data_dir))
            self._prepare(manual_dir)
        self._image_key, self._label_key = self._find_keys(label_key)

    @property
    def split_names(self) -> Sequence[str]:
        """See Dataset."""
        return list(self._builder.info.splits)

    @property
    def class_names(self) -> Sequence[str]:
        """See Dataset."""
        return _scalar(self._builder.info.features[self._label_key]).names

    def split(self, expression: str) -> Source:
        """See Dataset."""
        decoders = {self._image_key: self._tfds.decode.SkipDecoding()}
        try:
            records = self._builder.as_data_source(expression, decoders=decoders)
        except NotImplementedError as error:
            raise DatasetError(
                f"{self.name} in {self._builder.data_dir} is stored as "
                f"{self._builder.info.file_format.value}, which cannot be read in "
                "random order. Prepare it as array_record in another tfds_data_dir, or "
                "convert it with `tfds convert_format --dataset_dir="
                f"{self._builder.data_dir} --out_file_format=array_record "
                "--out_path=<new folder>`."
            ) from error
        except ValueError as error:
            raise DatasetError(f"{self.name}, split {expression!r}: {error}") from error
        return TfdsSource(
            f"{self.name} {expression}", records, self._image_key, self._label_key
        )

    def _prepare(self, manual_dir: str | None) -> None:
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # leave the memory to JAX
        tf.config.set_visible_devices([], "TPU")
        logger.info("preparing %s in %s, once", self.name, self._builder.data_dir)
        self._builder.download_and_prepare(
            download_config=self._tfds.download.DownloadConfig(manual_dir=manual_dir)
        )

    def _find_keys(self, label_key: str | None) -> tuple[str, str]:
        """Returns the names of the image and label features.

        These are the supervised pair if there is one, or the first of each type.
        """
        info, features = self._builder.info, self._tfds.features
        images = [k for k, v in info.features.items() if isinstance(v, features.Image)]
        labels = [k for k, v in info.features.items() if hasattr(_scalar(v), "names")]
        image, label = info.supervised_keys or (*images[:1], *labels[:1], "", "")[:2]
        label = label_key or label
        if image not in images or label not in labels:
            raise DatasetError(
                f"{self.name} has no image with a class {label_key or ''}: its "
                f"features are {dict(info.features.items())}."
            )
        return image, label


@dataclasses.dataclass(frozen=True)
class TfdsSource:
    """Examples of a TFDS data source, whose images are not decoded yet."""

    name: str
    records: Sequence[Mapping]
    image_key: str
    label_key: str

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int, /) -> Example:
        record = self.records[index]
        label = record[self.label_key]
        return Example(
            record[self.image_key],
            int(label) if np.ndim(label) == 0 else tuple(int(x) for x in label),
            f"{self.name}, example {index}",
        )


def _scalar(feature: Any) -> Any:
    """Returns the feature itself, or the element of a sequence of features."""
    return getattr(feature, "feature", feature)


def _unknown_dataset(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name.split(":")[0], known, n=3)
    hint = f" Did you mean {' or '.join(map(repr, close))}?" if close else ""
    return (
        f"There is no dataset {name!r}: neither a folder or .csv/.tsv file of that "
        f"name nor a dataset of TensorFlow Datasets.{hint}"
    )


def _needs_tensorflow(name: str, folder: object) -> str:
    where = f"in {folder}" if folder else "in ~/tensorflow_datasets"
    return (
        f"{name} is not prepared {where}, and preparing it takes TensorFlow, once. "
        'Install it with `pip install -e ".[tfds]"` and start again, or set '
        "--config.tfds_data_dir to where the dataset is prepared as array_record."
    )
