"""What a model sees in image files."""

import concurrent.futures
import csv
import dataclasses
import io
import json
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mixer_jax.data.dataset import Example
from mixer_jax.data.decode import ImageError
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.model import MlpMixer
from mixer_jax.training.step import to_model_input
from mixer_jax.weights.layout import CheckpointError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, or why it could not be read.

    Attributes:
      file: its path.
      classes: indices, the likeliest first; empty if it could not be read.
      names: what these classes are called.
      probabilities: of these classes, the softmax over all.
      error: why the file could not be read.
    """

    file: str
    classes: Sequence[int] = ()
    names: Sequence[str] = ()
    probabilities: Sequence[float] = ()
    error: str | None = None


def predict(
    model: MlpMixer,
    params: Any,
    transform: EvalTransform,
    files: Sequence[str],
    *,
    class_names: Sequence[str] | None = None,
    top_k: int = 5,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """Classifies image files, turned upright as their EXIF orientation says.

    Args:
      model: the model.
      params: its parameters.
      transform: makes the images that it expects.
      files: paths of images.
      class_names: what the model's classes are called, if that is known.
      top_k: how many classes to name; at most all.
      batch_size: images at a time.

    Yields:
      a Prediction for each file, in their order. A file that cannot be read costs the
      others nothing.

    Raises:
      CheckpointError: the model has no head.
    """
    num_classes = model.num_classes
    if not num_classes:
        raise CheckpointError("The model has no head, and so no classes to predict.")
    names = class_names or [str(i) for i in range(num_classes)]
    params = jax.device_put(params)

    batch_size = min(
        batch_size, max(len(files), 1)
    )  # every batch has it: one compilation

    @jax.jit
    def classify(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        logits: Any = model.apply(
            {"params": params}, to_model_input(images), train=False
        )
        return jax.lax.top_k(jax.nn.softmax(logits), min(top_k, num_classes))

    def read(file: str) -> np.ndarray | str:
        try:
            return transform(Example(pathlib.Path(file), 0, file).pixels())
        except ImageError as error:
            return str(error)

    with concurrent.futures.ThreadPoolExecutor() as pool:
        for start in range(0, len(files), batch_size):
            part = files[start : start + batch_size]
            images = list(pool.map(read, part))
            readable = [image for image in images if not isinstance(image, str)]
            if readable:
                blanks = [readable[0]] * (batch_size - len(readable))
                results = classify(params, np.stack(readable + blanks))
                rows = zip(*jax.device_get(results), strict=True)
            for file, image in zip(part, images, strict=True):
                if isinstance(image, str):
                    yield Prediction(file, error=image)
                    continue
                probabilities, classes = next(rows)
                yield Prediction(
                    file,
                    classes.tolist(),
                    [names[i] for i in classes],
                    probabilities.tolist(),
                )


def format_predictions(predictions: Iterable[Prediction], form: str) -> str:
    """Writes predictions out, those of unreadable files in JSON only.

    Args:
      predictions: see `predict`.
      form: "table", for people; "csv", one line a class with the columns file, rank,
        class, name, probability; or "json", a list of Prediction's fields.
    """
    if form == "json":
        fields = [dataclasses.asdict(x) for x in predictions]
        return json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
    readable = [x for x in predictions if x.error is None]
    if form == "csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["file", "rank", "class", "name", "probability"])
        for x in readable:
            columns = zip(x.classes, x.names, x.probabilities, strict=True)
            for rank, (index, name, probability) in enumerate(columns, start=1):
                writer.writerow([x.file, rank, index, name, f"{probability:.6g}"])
        return text.getvalue()
    width = max((len(x.file) for x in readable), default=0)
    lines = []
    for x in readable:
        for i, (name, probability) in enumerate(
            zip(x.names, x.probabilities, strict=True)
        ):
            file = "" if i else x.file
            lines.append(f"{file:{width}}  {probability:6.1%}  {name}\n")
    return "".join(lines)
