"""What one does with a model: evaluate, predict, export."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from tqdm import tqdm
from tyro.conf import Positional

from mixer_jax.cli.app import UsageError, app, print_table
from mixer_jax.data.evaluations import EVALUATIONS
from mixer_jax.data.interpolate import INTERPOLATIONS
from mixer_jax.data.names import printable
from mixer_jax.data.preprocess import (
    Color,
    EvalTransform,
    as_color,
)
from mixer_jax.data.sizes import Size, covers, parse_size, size_text
from mixer_jax.data.walk import find_images
from mixer_jax.evaluation.prediction import format_predictions
from mixer_jax.evaluation.prediction import predict as predict_files
from mixer_jax.files import replace_when_whole
from mixer_jax.run.loading import LoadedModel, load_model, open_test_split
from mixer_jax.run.source import find_workdir
from mixer_jax.weights.export import export_onnx, export_stablehlo
from mixer_jax.weights.layout import check_params
from mixer_jax.weights.published import without_secrets
from mixer_jax.weights.resolution import METHODS

if TYPE_CHECKING:
    from mixer_jax.evaluation.classification import Report

    Evaluation = str
    Interpolation = str
    Resolution = str
else:
    Evaluation = tyro.extras.literal_type_from_choices(EVALUATIONS)
    Interpolation = tyro.extras.literal_type_from_choices(INTERPOLATIONS)
    Resolution = tyro.extras.literal_type_from_choices(METHODS)


def _of_one_text(
    metavar: str, parse: Callable[[str], Any], show: Callable[[Any], str]
) -> tyro.constructors.PrimitiveConstructorSpec:
    """Tells tyro that a tuple is given as one text, such as 320x224."""
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=metavar,
        instance_from_str=lambda texts: parse(texts[0]),
        is_instance=lambda x: isinstance(x, tuple),
        str_from_instance=lambda x: [show(x)],
    )


def _parse_color(text: str) -> Color:
    """Returns the three numbers in a text such as "0.5" or "0.485,0.456,0.406"."""
    values = [float(x) for x in text.split(",")]
    if len(values) not in (1, 3) or not all(0 <= x <= 1 for x in values):
        expected = "one number from 0 to 1, or three such as 0.485,0.456,0.406"
        raise ValueError(f"{text!r} is not {expected}.")
    return as_color(values[0] if len(values) == 1 else values)


def _color_text(color: Color) -> str:
    return ",".join(map(str, color))


ImageSize = Annotated[Size, _of_one_text("N|HxW", parse_size, size_text)] | None
ChannelValues = (
    Annotated[Color, _of_one_text("X|R,G,B", _parse_color, _color_text)] | None
)


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """How to use a model, instead of what its run or file says."""

    class_names: str | None = None
    """"imagenet1k", or a file with one name a line or a JSON list. Default: what is
    known of the model."""
    gelu: Literal["tanh", "erf"] | None = None
    """Default: what is known of the model."""
    mean: ChannelValues = None
    """Of red, green and blue in units of [0, 1], such as 0.5 or 0.485,0.456,0.406.
    Default: what is known of the model, or 0.5."""
    std: ChannelValues = None
    """The standard deviation in the same way."""
    evaluation: Evaluation | None = None
    """How images are brought to size. Default: what is known of the model, or
    resize."""
    resize: ImageSize = None
    """Pixels to resize to before a central crop, such as 256 or 366x256. Default: what
    is known of the model, or 256/224 of its image size."""
    interpolation: Interpolation | None = None
    """How images are resized. Default: what is known of the model, or usual for the
    evaluation."""
    image_size: ImageSize = None
    """Size of the images in pixels, such as 224 or 320x224 (height x width). Default:
    what the model is for. For another size its parameters are adapted."""
    resolution: Resolution = "interpolate"
    """How they are adapted: interpolate for any size; block_diagonal for whole
    multiples, as in the paper."""

    def load(self, model: str) -> tuple[LoadedModel, EvalTransform]:
        """Loads a model and the transform of its images."""
        check_std(self.std)
        if self.resize is not None and min(self.resize) < 1:
            raise UsageError(f"--resize is {size_text(self.resize)}; 1 is the least.")
        loaded = load_model(
            model,
            gelu=self.gelu,
            mean=self.mean,
            std=self.std,
            class_names=self.class_names,
            image_size=self.image_size,
            resolution=self.resolution,
        )
        old = loaded.transform
        if loaded.config is None:  # a file may be for images of other channels
            where, shape = without_secrets(model), (*old.crop, 3)
            check_params(loaded.params, loaded.model, shape, where)
        resize = self.resize or old.resize
        new = dataclasses.replace(
            old,
            evaluation=self.evaluation or old.evaluation,
            resize=resize,
            interpolation=self.interpolation or old.interpolation,
        )
        if new.evaluation != "resize" and not covers(resize, new.crop):
            crop = size_text(new.crop)
            raise UsageError(
                f"--resize is {size_text(resize)}, but the model sees {crop} pixels: "
                f"{new.evaluation} needs at least that. Give --resize {crop}, say."
            )
        return loaded, new


def check_std(std: Color | None) -> None:
    """Raises a UsageError unless pixels can be divided by `std`."""
    if std is not None and min(std) == 0:
        raise UsageError("--std is 0, expected numbers above 0.")


Model = Annotated[
    Positional[str],
    tyro.conf.arg(
        metavar="MODEL",
        help="a run's workdir; a published name such as imagenet1k/Mixer-B_16; a name "
        "of the Hugging Face hub such as timm/mixer_b16_224.goog_in21k, or a folder "
        "from there; an .npz file, in the published or the older layout; a "
        ".safetensors file of timm or mlp-mixer-pytorch.",
    ),
]
Flags = Annotated[ModelFlags, tyro.conf.arg(name="")]


@app.command
def evaluate(
    model: Model,
    flags: Flags,
    dataset: str | None = None,
    split: str | None = None,
    tfds_data_dir: str | None = None,
    batch: int = 128,
    json_file: pathlib.Path | None = None,
    confusion_matrix: pathlib.Path | None = None,
) -> None:
    """Scores a model on a dataset: top-1, top-5, loss, and accuracy by class.

    If the run trained on images with several labels: mean average precision too, and
    average precision by class.

    Args:
      dataset: "digits", a folder, a .csv or .tsv file, or a name of TensorFlow
        Datasets. Default: what the run was trained on.
      split: such as test or "validation[:1000]". Default: what the run was tested on,
        or what is usual for the dataset.
      tfds_data_dir: where TensorFlow Datasets keeps prepared datasets.
      batch: images at a time.
      json_file: write all numbers to this file too.
      confusion_matrix: draw one as this file, .png or .svg, of at most 50 classes.
    """
    # Grain takes a third of a second to import, and nothing else here needs it.
    from mixer_jax.evaluation.classification import evaluate_dataset
    from mixer_jax.visualize import draw_confusion_matrix, save_figure
    from mixer_jax.visualize.files import check_figure_path

    if dataset is None and find_workdir(model) is None:
        is_here = (
            "not " if pathlib.Path(model).expanduser().exists() else "not here, so not "
        )
        raise UsageError(
            f"{printable(without_secrets(model))} is {is_here}the workdir of a run. A "
            "model of any other kind needs a --dataset."
        )
    if batch < 1:
        raise UsageError(f"--batch is {batch}; 1 is the least.")
    if confusion_matrix:
        check_figure_path(confusion_matrix)
    loaded, transform = flags.load(model)
    num_classes = loaded.model.num_classes or 0
    if confusion_matrix and num_classes > 50:
        raise UsageError(f"No confusion matrix of {num_classes} classes: 50 at most.")
    if confusion_matrix and loaded.multilabel:
        raise UsageError("No confusion matrix where images have several labels.")
    opened, split = open_test_split(loaded, dataset, split, tfds_data_dir)
    report = evaluate_dataset(
        loaded.model,
        loaded.params,
        transform,
        opened,
        split,
        class_names=loaded.class_names,
        loss_fn=loaded.loss_fn,
        multilabel=loaded.multilabel,
        batch_size=batch,
    )
    _print_report(report, f"{opened.name} {split}", transform)
    if json_file:
        about: dict[str, Any] = {
            "model": printable(without_secrets(model)),
            "dataset": printable(opened.name),
            "split": printable(split),
        }
        about |= {"transform": transform.as_dict()} | report.as_dict()
        with replace_when_whole(json_file) as partial:
            partial.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    if confusion_matrix:
        matrix = report.confusion_matrix()
        figure = draw_confusion_matrix(matrix, report.class_names)
        save_figure(figure, confusion_matrix)


@app.command
def predict(
    model: Model,
    files: Positional[list[str]],
    flags: Flags,
    top_k: int = 5,
    form: Annotated[
        Literal["table", "json", "csv"], tyro.conf.arg(name="format")
    ] = "table",
    output: pathlib.Path | None = None,
    batch: int = 32,
) -> None:
    """Names what is in image files. Exits with 1 if some could not be read.

    Args:
      files: images, folders of images, or globs in quotes such as "photos/**/*.jpg".
      top_k: how many classes to name.
      form: how to print.
      output: print to this file.
      batch: images at a time.
    """
    if not files:
        raise UsageError("Name images, folders or globs after the model.")
    if top_k < 1 or batch < 1:
        raise UsageError(f"--top-k is {top_k} and --batch {batch}; 1 is the least.")
    paths = find_images(files)
    loaded, transform = flags.load(model)
    found = predict_files(
        loaded.model,
        loaded.params,
        transform,
        paths,
        class_names=loaded.class_names,
        multilabel=loaded.multilabel,
        top_k=top_k,
        batch_size=batch,
    )
    bar = tqdm(found, total=len(paths), unit=" images", disable=None, leave=False)
    predictions = list(bar)
    text = format_predictions(predictions, form)
    if output:
        with replace_when_whole(output) as partial:
            partial.write_text(text, "utf-8")
    else:
        print(text, end="")
    unreadable = [x for x in predictions if x.error]
    for x in unreadable:
        print(f"{x.file}: {x.error}", file=sys.stderr)
    if unreadable:
        sys.exit(1)


@app.command
def export(
    model: Model,
    output: Positional[pathlib.Path],
    flags: Flags,
    features: bool = False,
) -> None:
    """Writes a model as one file that runs without this package, and a JSON beside it.

    Activations are float32 in it, whatever they were in the run.

    Args:
      output: ending in .stablehlo, for JAX on CPU, CUDA and TPU; or in .onnx, which
        takes the extra onnx.
      features: give pre_logits instead of logits.
    """
    write = {
        ".stablehlo": export_stablehlo,
        ".onnx": export_onnx,
    }.get(output.suffix)
    if write is None:
        raise UsageError(f"{output} ends in neither .stablehlo nor .onnx.")
    loaded, transform = flags.load(model)
    float32 = loaded.model.clone(dtype="float32")
    write(
        output,
        float32,
        loaded.params,
        transform,
        loaded.class_names,
        features=features,
    )
    print(f"{output}: {output.stat().st_size:,} bytes, described in {output}.json")


def _print_report(report: "Report", data: str, transform: EvalTransform) -> None:
    """Prints what was measured; of many classes only the ten worst."""
    metrics, names = report.metrics, report.class_names
    crop = size_text(transform.crop)
    how = f"resize {size_text(transform.resize)}, crop {crop}"
    if transform.evaluation == "resize":
        how = f"to {crop}"
    how += f", {transform.used_interpolation}"
    print(f"data       {data}, {metrics['count']:,.0f} images")
    print(f"transform  {transform.evaluation}, {how}")
    if "mAP" in metrics:
        print(f"mAP        {metrics['mAP']:.2%}")
    print(f"top-1      {metrics['top1']:.2%}")
    if len(names) > 5:
        print(f"top-5      {metrics['top5']:.2%}")
    print(f"loss       {metrics['loss']:.4f}\n")
    scores, counts = report.class_scores()
    shown = np.flatnonzero(counts)
    if len(shown) > 50:
        shown = shown[np.argsort(scores[shown], kind="stable")[:10]]
        print("The ten classes with the lowest score (--json-file has all):")
    rows = [(names[i], f"{scores[i]:.2%}", f"{counts[i]:,}") for i in shown.tolist()]
    score = "average precision" if "mAP" in metrics else "top-1"
    print_table([("class", score, "images"), *rows], "<>>")
