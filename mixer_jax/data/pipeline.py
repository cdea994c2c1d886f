"""Batches of examples with Grain: shuffle, transform, share among processes, batch.

The training stream is a function of the seed and the position alone: the seed and i
determine the image and the augmentation of example i, and step s takes the examples
[s * batch, (s + 1) * batch). So a run resumes by starting at a step, and the number of
processes does not change what a batch contains.
"""

import dataclasses
import functools
import logging
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import grain
import numpy as np
from grain import experimental

from mixer_jax.data.dataset import DatasetError, Example, Source
from mixer_jax.data.decode import ImageError, ImageFileError, say_once
from mixer_jax.data.jpeg import Pixels
from mixer_jax.data.preprocess import EvalTransform, TrainTransform
from mixer_jax.data.workers import Workers, log_again, num_cores

logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]

# Threads are enough: reading, decoding and resizing release Python's lock.
NUM_THREADS = min(num_cores(), 64)

# Examples that a thread prepares at a time. With images of 16 pixels, one at a time
# takes 1.4 times as long, since threads then wait for each other more often
# (mixer-jax benchmark --config configs/digits.py --parts input --sources digits).
CHUNK = 8


def train_batches(
    source: Source,
    transform: TrainTransform,
    *,
    batch_size: int,
    seed: int,
    num_classes: int | None = None,
    start_step: int = 0,
    prefetch: int = 2,
    rows: Sequence[int] | None = None,
    split: str = "train",
    missing: Collection[str] | None = None,
    workers: int = 0,
) -> "_Batches":
    """Gives this process's rows of one training batch after another, without end.

    An image that is damaged is reported and replaced by another one, which the same
    generator draws. So is a file that is known to be missing. Another one that cannot
    be read is an error: at the next start it may be readable, and the run another one.

    Args:
      source: the examples.
      transform: from an image and a generator to what the model sees.
      batch_size: number of examples of a whole batch, over all processes.
      seed: of the order and the augmentation.
      num_classes: see `eval_batches`.
      start_step: the step of the first batch.
      prefetch: how many batches to prepare ahead.
      rows: which rows of each batch this process reads; None for all.
      split: of the examples, for messages.
      missing: paths of files that are left out as damaged images are. An image of
        another file must be readable. None: files are left out that cannot be read.
      workers: how many processes prepare examples; 0 for threads of this one. It does
        not change a batch. See `mixer_jax.data.workers`.

    Returns:
      An iterator, to be closed, of `image` [rows, *crop, 3] and `label` int32
      [rows], or with num_classes float32 [rows, num_classes]. Its next() raises
      DatasetError for an example without a label or whose file cannot be read,
      ImageError if 100 images in a row are damaged, and ChildProcessError if a worker
      was killed.
    """
    unreadable = _Unreadable(split, missing)
    prepare = _TrainExample(source, transform, num_classes, unreadable)
    # Of positions: Grain counts the bytes of what a source gives, which takes as long
    # as all else that it does for an example.
    stream = grain.MapDataset.range(len(source)).seed(seed).shuffle().repeat()
    stream = stream.random_map(prepare)
    num_batches = 2**62 // batch_size  # practically without end
    rows = range(batch_size) if rows is None else rows
    view = _View(stream, batch_size, rows, num_batches, start_step)
    return _Batches(view, len(rows), prefetch, workers, unreadable)


def eval_batches(
    source: Source,
    transform: EvalTransform,
    *,
    batch_size: int,
    num_classes: int | None = None,
    multilabel: bool = False,
    prefetch: int = 2,
    rows: Sequence[int] | None = None,
    split: str = "test",
    missing: Collection[str] | None = None,
    workers: int = 0,
) -> "_Batches":
    """Gives this process's rows of every example, once and in order.

    All batches have the same size; the last one is padded. The mask is 0 for padding,
    for images that are damaged, which are reported, and for images without a label.

    Args:
      source: the examples.
      transform: from an image to what the model sees.
      batch_size: number of examples of a whole batch, over all processes.
      num_classes: for datasets whose images have several labels: each image's labels
        become a row with 1 for its classes and 0 for the others.
      multilabel: whether all labels are to be found. An image that is known to be of
        no class then counts.
      prefetch: how many batches to prepare ahead.
      rows: which rows of each batch this process reads; None for all.
      split: of the examples, for messages.
      missing: see `train_batches`.
      workers: see `train_batches`.

    Returns:
      An iterator, to be closed, of `image` [rows, *crop, 3], `label` int32 [rows]
      and `mask` float32 [rows]; with num_classes `label` is float32
      [rows, num_classes]. Its next() raises DatasetError for a file that cannot be
      read, and ChildProcessError if a worker was killed.
    """
    unreadable = _Unreadable(split, missing)
    prepare = _EvalExample(source, transform, num_classes, multilabel, unreadable)
    num_batches = -(-len(source) // batch_size)
    stream = grain.MapDataset.range(num_batches * batch_size).map(prepare)
    rows = range(batch_size) if rows is None else rows
    view = _View(stream, batch_size, rows, num_batches)
    return _Batches(view, len(rows), prefetch, workers, unreadable)


def _as_array(label: int | tuple[int, ...], num_classes: int | None) -> np.ndarray:
    """Returns a label as int32 [], or labels as float32 [num_classes]."""
    if num_classes is None:
        return np.asarray(label, np.int32)
    return np.isin(np.arange(num_classes), label).astype(np.float32)


@dataclasses.dataclass(frozen=True)
class _TrainExample:
    """From the position of an example and a generator to a row of a batch."""

    source: Source
    transform: TrainTransform
    num_classes: int | None
    unreadable: "_Unreadable"

    def __call__(self, index: int, rng: np.random.Generator) -> dict[str, Any]:
        example = self.source[index]
        if example.label == -1:
            raise DatasetError(
                f"{example.name} has no label; train on a split that has them."
            )
        state = rng.bit_generator.state
        for _ in range(100):
            image = self.unreadable.pixels_or_none(
                example, functools.partial(self.transform, rng=rng)
            )
            if image is not None:
                return {
                    "image": image,
                    "label": _as_array(example.label, self.num_classes),
                }
            rng.bit_generator.state = state  # the damaged image has drawn nothing
            example = self.source[int(rng.integers(len(self.source)))]
            state = rng.bit_generator.state
        raise ImageError(
            "100 images in a row cannot be read. Is the disk or network that they are "
            "on in order?"
        )


@dataclasses.dataclass(frozen=True)
class _EvalExample:
    """From a position, which may be behind the end, to a row of a batch."""

    source: Source
    transform: EvalTransform
    num_classes: int | None
    multilabel: bool
    unreadable: "_Unreadable"

    def __call__(self, i: int) -> dict[str, Any]:
        image: np.ndarray | None = None
        label: int | tuple[int, ...] = -1
        if i < len(self.source):  # and not padding
            example = self.source[i]
            image = self.unreadable.pixels_or_none(example, self.transform)
            label = example.label
        has_label = label != -1 and (self.multilabel or label != ())
        if not has_label:
            label = 0 if self.num_classes is None else ()
        return {
            "image": self.blank if image is None else image,
            "label": _as_array(label, self.num_classes),
            "mask": np.float32(image is not None and has_label),
        }

    @functools.cached_property
    def blank(self) -> np.ndarray:
        """What stands for padding and damaged images."""
        return self.transform(np.zeros((*self.transform.crop, 3), np.uint8)) * 0


class _Unreadable:
    """Decodes and transforms, and reports each example that is damaged once."""

    def __init__(self, split: str, missing: Collection[str] | None):
        self.split, self.missing, self.names = split, missing, set[str]()

    def pixels_or_none(
        self, example: Example, transform: Callable[[Pixels], np.ndarray]
    ) -> np.ndarray | None:
        try:
            return transform(example.open())
        except ImageError as error:
            is_file = isinstance(error, ImageFileError)
            if is_file and not (
                self.missing is None or str(example.image) in self.missing
            ):
                raise DatasetError(
                    f"{example.name}, an image of the split {self.split}, cannot be "
                    f"read: {error}. Bring it back, or its disk; then give the same "
                    "command again."
                ) from error
            self.report(example.name, str(error))
            return None

    def report(self, name: str, error: str) -> None:
        """Warns of a damaged image, once."""
        if name not in self.names:
            self.names.add(name)
            logger.warning(
                "skipping %s: %s (%d so far)",
                name,
                error,
                len(self.names),
                extra={"skipped": (name, error)},
            )

    def retell(self, record: logging.LogRecord) -> None:
        """Logs what a worker has logged, unless another one did before."""
        if hasattr(record, "skipped"):
            self.report(*record.skipped)
        elif hasattr(record, "once"):
            say_once(*record.once)
        else:
            log_again(record)


class _View:
    """The given rows of each batch of a dataset, beginning with the batch `start`."""

    def __init__(
        self,
        dataset: grain.MapDataset,
        batch_size: int,
        rows: Sequence[int],
        num_batches: int,
        start: int = 0,
    ):
        self._dataset, self._batch_size, self._rows = dataset, batch_size, rows
        self._num_batches, self._start = num_batches, start

    def __len__(self) -> int:
        return self._num_batches * len(self._rows)

    def __getitem__(self, index: int, /) -> dict[str, Any]:
        batch, row = divmod(index, len(self._rows))
        position = (self._start + batch) * self._batch_size + self._rows[row]
        try:
            return self._dataset[position]
        except Exception:
            raise
        except BaseException as error:
            # Grain's thread would end without a word, and its reader wait for ever.
            raise DatasetError(
                f"The reader of example {position} ended with "
                f"{type(error).__name__}: {error}"
            ) from error


class _Batches(Iterator[Batch]):
    """Rows of batches, prepared ahead by threads or workers. To be closed.

    Up to `prefetch` batches are ready, or a chunk for each thread if that is more,
    whatever the number of workers; and each thread is at work on one chunk. One more
    batch is whole, and one is being joined.
    """

    def __init__(
        self,
        view: _View,
        rows: int,
        prefetch: int,
        num_workers: int,
        unreadable: _Unreadable,
    ):
        chunks = grain.MapDataset.range(len(view)).map(view.__getitem__).batch(CHUNK)
        num_threads, workers = NUM_THREADS, None
        if num_workers:
            workers = Workers(chunks, num_workers, unreadable.retell)
            num_threads = workers.num_threads
            chunks = grain.MapDataset.source(workers)
        ahead = max(-(-rows // CHUNK) * prefetch, num_threads)
        options = grain.ReadOptions(num_threads=num_threads, prefetch_buffer_size=ahead)
        dataset = experimental.RebatchIterDataset(chunks.to_iter_dataset(options), rows)
        dataset = experimental.ThreadPrefetchIterDataset(
            dataset, prefetch_buffer_size=1
        )
        self._iterator = iter(dataset)
        # At the latest when this is dropped, or at the program's end.
        self._close = weakref.finalize(self, _close, workers, self._iterator)

    def __next__(self) -> Batch:
        return next(self._iterator)

    def close(self) -> None:
        """Ends the threads and workers."""
        self._close()


def _close(workers: Workers | None, iterator: grain.DatasetIterator) -> None:
    if workers is not None:
        workers.close()  # first, as threads wait for them
    iterator.close()
