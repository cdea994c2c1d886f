"""What a model sees in image files."""

import concurrent.futures
import csv
import dataclasses
import io
import json
import math
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixer_jax.data.dataset import Example
from mixer_jax.data.decode import ImageError
from mixer_jax.data.names import printable
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.model import MlpMixer
from mixer_jax.training.step import to_model_input
from mixer_jax.weights.layout import CheckpointError


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The likeliest classes of an image, or why there are none.

    Attributes:
      file: path of the image.
      classes: indices, the likeliest first; empty if there is an error.
      names: names of these classes.
      probabilities: of these classes: the softmax over all classes; of a model that
        finds several labels, each class's own.
      error: why the file could not be read, or that its logits are NaN.
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
    multilabel: bool = False,
    top_k: int = 5,
    batch_size: int = 32,
) -> Iterator[Prediction]:
    """Classifies image files, turned upright as their EXIF orientation says.

    Args:
      model: the model.
      params: its parameters.
      transform: makes the images that the model expects.
      files: paths of images.
      class_names: names of the model's classes, if they are known.
      multilabel: whether the model was trained to find all of several labels.
      top_k: how many classes to name; at most all.
      batch_size: images at a time.

    Yields:
      A Prediction for each file, in their order, whether it can be read or not.

    Raises:
      CheckpointError: the model has no head.
    """
    num_classes = model.num_classes
    if not num_classes:
        raise CheckpointError("The model has no head, and so no classes to predict.")
    names = class_names or [str(i) for i in range(num_classes)]
    params = jax.device_put(params)

    # Every batch has this size, so that the model is compiled once.
    batch_size = min(batch_size, max(len(files), 1))

    @jax.jit
    def classify(params: Any, images: jax.Array) -> tuple[jax.Array, jax.Array]:
        images = to_model_input(images, transform.mean, transform.std)
        logits: Any = model.apply({"params": params}, images, train=False)
        classes = jax.lax.top_k(logits, min(top_k, num_classes))[1]
        probabilities = jax.nn.sigmoid if multilabel else jax.nn.softmax
        return jnp.take_along_axis(probabilities(logits), classes, -1), classes

    def read(file: str) -> np.ndarray | str:
        try:
            return transform(Example(pathlib.Path(file), 0, file).open())
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
                probabilities, classes = (x.tolist() for x in next(rows))
                if math.isnan(probabilities[0]):
                    yield Prediction(file, error="the model's logits are NaN")
                    continue
                class_names = [names[i] for i in classes]
                yield Prediction(file, classes, class_names, probabilities)


def format_predictions(predictions: Iterable[Prediction], form: str) -> str:
    """Formats predictions as a text. Those with an error are in JSON only.

    Names of files are as `mixer_jax.data.names.printable` gives them.

    Args:
      predictions: see `predict`.
      form: "table", for people; "csv", one line a class with the columns file, rank,
        class, name, probability; or "json", a list of Prediction's fields.
    """
    predictions = [dataclasses.replace(x, file=printable(x.file)) for x in predictions]
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
