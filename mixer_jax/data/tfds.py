"""Datasets of TensorFlow Datasets, read without TensorFlow."""

import dataclasses
import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mixer_jax.data.dataset import DatasetError, Example, Part, Source, squashed
from mixer_jax.data.names import listing

logger = logging.getLogger(__name__)


class TfdsDataset:
    """Any image classification dataset of TensorFlow Datasets.

    Downloading and preparing one needs TensorFlow, once. Reading it does not.

    Args:
      name: of the dataset, such as "cifar10" or "cifar10:3.0.2"; see `find_name`.
      data_dir: where prepared datasets are; None for ~/tensorflow_datasets.
      manual_dir: where files are that must be downloaded by hand.
      label_key: see `open_dataset`.

    Raises:
      DatasetError: there is no such version or config, it has no images with classes,
        or it must be prepared and TensorFlow is not installed.
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
        except ImportError as error:
            raise DatasetError(_needs_tensorflow(name, data_dir)) from error
        except (ValueError, AssertionError, TypeError) as error:
            raise DatasetError(_wrong_variant(name, error)) from error
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
        except (ValueError, AssertionError) as error:
            raise self._wrong_split(expression, error) from error
        return TfdsSource(
            f"{self.name} {expression}", records, self._image_key, self._label_key
        )

    def parts(self, expression: str) -> list[Part]:
        """See Dataset."""
        try:
            read = self._tfds.core.ReadInstruction.from_spec(expression)
            ranges = read.to_absolute(self._builder.info.splits)
        except (ValueError, AssertionError, KeyError) as error:
            raise self._wrong_split(expression, error) from error
        sizes = {name: x.num_examples for name, x in self._builder.info.splits.items()}
        return [
            Part(
                x.splitname,
                x.from_ or 0,
                sizes[x.splitname] if x.to is None else x.to,
            )
            for x in ranges
        ]

    def columns(self, expression: str) -> dict[str, list[bytes]]:
        """See Dataset."""
        info = self._builder.info
        sizes = [f"{k}: {x.num_examples}" for k, x in sorted(info.splits.items())]
        about = {"version": [info.full_name], "sizes of the splits": sizes}
        about["selection"] = [str(x) for x in self.parts(expression)]
        return {key: [x.encode() for x in texts] for key, texts in about.items()}

    def _wrong_split(self, expression: str, error: Exception) -> DatasetError:
        splits = self._builder.info.splits.items()
        sizes = ", ".join(f"{name} ({x.num_examples:,})" for name, x in splits)
        return DatasetError(
            f"{self.name}, split {expression!r}: {str(error).splitlines()[0]} "
            f"Expected one of {sizes}, with a slice such as train[:90%] if you like, "
            "in pp.train or pp.test of a config or behind --split."
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


def known_names() -> list[str]:
    """Returns the names of all datasets of TensorFlow Datasets."""
    import tensorflow_datasets as tfds

    return tfds.list_builders(with_community_datasets=False)


def find_name(name: str, data_dir: str | None) -> str | None:
    """Returns a name as TensorFlow Datasets spells it, None if it has no such dataset.

    The version and config behind it stay. A dataset of the user's own counts if it is
    prepared in `data_dir`. What is spelled differently is said.
    """
    import tensorflow_datasets as tfds

    name = name.strip()
    match = re.fullmatch(r"([\w -]+)((?:/[\w.+=,-]+)?(:[\w.*]+)?)", name)
    if match is None:
        return None
    base, rest, version = match.groups()
    found = {squashed(x): x for x in known_names()}.get(squashed(name))
    own = re.fullmatch(r"\w+", base) and re.match(r":[\d*]", version or ":*")
    if not found and own:  # of "a:b" it would ask the network
        try:
            tfds.builder(name, data_dir=data_dir)
        except (tfds.core.DatasetNotFoundError, ValueError):  # ValueError: for "x:1"
            return None
        found = base
    if found and found != base:
        logger.warning("%s is taken for %s of TensorFlow Datasets", base, found)
    return found and found + rest


def _wrong_variant(name: str, error: Exception) -> str:
    """Says which versions and configs a dataset has."""
    import tensorflow_datasets as tfds

    builder = tfds.builder_cls(re.split("[:/]", name)[0])
    versions = [builder.VERSION, *builder.SUPPORTED_VERSIONS]
    configs = [config.name for config in builder.BUILDER_CONFIGS]
    text = f"TensorFlow Datasets has no {name!r}."
    if ":" in name:
        text += f" Expected the version {listing(list(map(str, versions)))}, or none."
    elif "/" not in name:
        text += f" {str(error).splitlines()[-1]}"
    if "/" in name:
        text += (
            f" Expected {f'the config {listing(configs)}' if configs else 'no config'}."
        )
    return text


def _needs_tensorflow(name: str, folder: object) -> str:
    where = f"in {folder}" if folder else "in ~/tensorflow_datasets"
    return (
        f"{name} is not prepared {where}, and preparing it takes TensorFlow, once. "
        'Install it with `pip install -e ".[tfds]"` and start again, or set '
        "--config.tfds_data_dir to where the dataset is prepared as array_record."
    )
