"""The command mixer-jax: what one does with a model once it is trained.

A subcommand is a function below `app.command`: its arguments are the flags, its
docstring the help.
"""

import dataclasses
import json
import logging
import math
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro
from absl import flags as absl_flags
from absl import logging as absl_logging
from ml_collections import config_flags
from tqdm import tqdm
from tyro.conf import Positional

from mixer_jax.data.dataset import DatasetError, open_dataset
from mixer_jax.data.names import printable
from mixer_jax.data.preprocess import EVALUATIONS, EvalTransform
from mixer_jax.data.splits import choose_splits
from mixer_jax.data.walk import find_images
from mixer_jax.evaluation.prediction import format_predictions
from mixer_jax.evaluation.prediction import predict as predict_files
from mixer_jax.files import FileError, replace_when_whole
from mixer_jax.run.loading import LoadedModel, load_model
from mixer_jax.weights.export import ExportError, export_onnx, export_stablehlo
from mixer_jax.weights.layout import CheckpointError, infer_model
from mixer_jax.weights.npz import save_checkpoint
from mixer_jax.weights.published import (
    PUBLISHED,
    cache_dir,
    is_cached,
    published_name,
)
from mixer_jax.weights.timm import save_timm

if TYPE_CHECKING:
    from mixer_jax.evaluation.classification import Report

    Evaluation = str
else:
    Evaluation = tyro.extras.literal_type_from_choices(EVALUATIONS)

app = tyro.extras.SubcommandApp()
data_app = tyro.extras.SubcommandApp()
app.command(data_app, name="data", help="Looks at datasets before they are used.")


class UsageError(ValueError):
    """Arguments that make no sense together."""


@dataclasses.dataclass(frozen=True)
class ModelFlags:
    """How to read and feed a model, where its own word is not to be taken."""

    class_names: str | None = None
    """"imagenet1k", or a file with one name a line or a JSON list. Default: a run's
    own; ImageNet-1k's for published files of 1000 classes."""
    gelu: Literal["tanh", "erf"] | None = None
    """Default: as the run or safetensors file says, "tanh" for npz files."""
    evaluation: Evaluation | None = None
    """How images are cut to size. Default: as the run does;
    resize_small_then_central_crop for published files; else resize."""
    resize: int | None = None
    """Pixels to resize to before a central crop. Default: the run's, or 256/224 of the
    model's image size."""

    def load(self, model: str) -> tuple[LoadedModel, EvalTransform]:
        """Loads a model and the transform of its images."""
        loaded = load_model(model, gelu=self.gelu, class_names=self.class_names)
        old = loaded.transform
        resize = self.resize or (
            old.resize if loaded.config else round(old.crop * 256 / 224)
        )
        new = dataclasses.replace(
            old, evaluation=self.evaluation or old.evaluation, resize=resize
        )
        if new.evaluation != "resize" and resize < new.crop:
            raise UsageError(
                f"--resize is {resize}, but the model sees {new.crop} pixels a side: a "
                "central crop needs at least that."
            )
        return loaded, new


Model = Annotated[
    Positional[str],
    tyro.conf.arg(
        metavar="MODEL",
        help="a run's workdir; a published name such as imagenet1k/Mixer-B_16; an npz "
        "file, in the published or the older layout; or timm's .safetensors.",
    ),
]
Flags = Annotated[ModelFlags, tyro.conf.arg(name="")]
Config = Annotated[
    Positional[str],
    tyro.conf.arg(
        metavar="CONFIG",
        help="a config file such as configs/b16.py or configs/b16.py:cifar100. Any "
        "value in it can be set, as in --config.pp.crop=128.",
    ),
]
Overrides = Annotated[  # main() strips them of their dashes
    Positional[tuple[str, ...]],
    tyro.conf.arg(metavar="[--config.KEY=VALUE …]", help="values of the config."),
]


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

    Args:
      dataset: "digits", a folder, a .csv or .tsv file, or a name of TensorFlow
        Datasets. Default: what the run was trained on.
      split: such as test or "validation[:1000]". Default: what the run was tested on,
        or what is usual for the dataset.
      tfds_data_dir: where TensorFlow Datasets keeps prepared datasets.
      batch: images at a time.
      json_file: write all numbers to this file too.
      confusion_matrix: draw one as this PNG file, of at most 50 classes.
    """
    # Grain takes a third of a second to import, and nothing else here needs it.
    from mixer_jax.evaluation.classification import evaluate_dataset
    from mixer_jax.visualize import plot_confusion_matrix

    if dataset is None and not pathlib.Path(model).expanduser().is_dir():
        raise UsageError("Name a --dataset; only the workdir of a run has its own.")
    if batch < 1:
        raise UsageError(f"--batch is {batch}; 1 is the least.")
    loaded, transform = flags.load(model)
    config: Any = loaded.config or {}
    if config and dataset in (None, config["dataset"]):
        dataset = config["dataset"]
        split = split or config["pp"]["test"]
        tfds_data_dir = tfds_data_dir or config["tfds_data_dir"]
    assert dataset is not None
    opened = open_dataset(dataset, data_dir=tfds_data_dir)
    split = choose_splits(dataset, opened, test=split)[1]
    num_classes = loaded.model.num_classes or 0
    if confusion_matrix and num_classes > 50:
        raise UsageError(f"No confusion matrix of {num_classes} classes: 50 at most.")
    report = evaluate_dataset(
        loaded.model,
        loaded.params,
        transform,
        opened,
        split,
        class_names=loaded.class_names,
        loss_fn=loaded.loss_fn,
        batch_size=batch,
    )
    _print_report(report, f"{dataset} {split}", transform)
    if json_file:
        about = {"model": model, "dataset": dataset, "split": split}
        cut = {k: getattr(transform, k) for k in ("evaluation", "crop", "resize")}
        about |= {"transform": cut} | report.as_dict()
        with replace_when_whole(json_file) as partial:
            partial.write_text(json.dumps(about, indent=2) + "\n", "utf-8")
    if confusion_matrix:
        plot_confusion_matrix(
            confusion_matrix, report.confusion_matrix(), report.class_names
        )


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


@app.command
def convert(
    model: Model,
    target: Positional[pathlib.Path],
    gelu: Literal["tanh", "erf"] | None = None,
) -> None:
    """Writes a model's parameters in another format.

    Args:
      target: a file ending in .npz (the published layout) or .safetensors (timm's).
      gelu: that the parameters go with. Default: as the run or safetensors file says,
        "tanh" for npz files.
    """
    if target.suffix not in (".npz", ".safetensors"):
        raise UsageError(f"{target} ends in neither .npz nor .safetensors.")
    loaded = load_model(model, gelu=gelu)
    own_gelu = loaded.model.gelu
    if target.suffix == ".npz":
        save_checkpoint(target, loaded.params)
    else:
        save_timm(target, loaded.params, gelu=own_gelu)
    print(f"{target}: {target.stat().st_size:,} bytes")
    if target.suffix == ".npz" and own_gelu == "erf":
        print("An npz file cannot say that these parameters go with the exact GELU.")
        print(
            "Give --gelu erf wherever you use it, and train.py --config.model.gelu=erf."
        )
    if target.suffix == ".safetensors" and own_gelu == "tanh":
        print("timm computes the exact GELU, these parameters were trained with the")
        print("tanh approximation: its logits will differ slightly.")


@data_app.command
def check(
    dataset: Positional[str],
    split: tuple[str, ...] = (),
    tfds_data_dir: str | None = None,
    label_key: str | None = None,
) -> None:
    """Reads every image of a dataset. Exits with 1 if some cannot be read.

    Prints the number and sizes of the images of each class, which images cannot be read
    and why, and warns of images that are in two splits or two classes, of very small
    images, and of classes of very different sizes.

    Args:
      dataset: "digits", a folder, a .csv or .tsv file, or a name of TensorFlow
        Datasets.
      split: such as train or "train[:1000]"; several are allowed. Default: all.
      tfds_data_dir: where TensorFlow Datasets keeps prepared datasets.
      label_key: the feature of such a dataset that holds the label or labels, if not
        the usual one; such as real_label of imagenet2012_real.
    """
    from mixer_jax.data.check import check_images, summarize, warnings

    opened = open_dataset(dataset, data_dir=tfds_data_dir, label_key=label_key)
    names = split or sorted(opened.split_names, key=lambda x: (x != "train", x))
    sources = {name: opened.split(name) for name in names}
    with tqdm(
        total=sum(map(len, sources.values())),
        unit=" images",
        disable=None,
        leave=False,
    ) as bar:
        checked = []
        for name, source in sources.items():
            for example in check_images(name, source):
                checked.append(example)
                bar.update()
    _print_table(summarize(checked, opened.class_names), "<<>>>>")
    for message in warnings(checked, opened.class_names):
        print(f"\nwarning: {message}")
    unreadable = [x for x in checked if x.error]
    if not unreadable:
        print(f"\nAll {len(checked):,} images can be read.")
        return
    print(f"\n{len(unreadable):,} of {len(checked):,} images cannot be read:")
    for x in unreadable:
        print(f"  {x.name}: {x.error}")
    sys.exit(1)


@data_app.command
def preview(
    config: Config,
    overrides: Overrides = (),
    output: pathlib.Path = pathlib.Path("preview.png"),
    rows: int = 6,
) -> None:
    """Draws what the model will see, in training and in the test, with labels.

    Args:
      output: the PNG file to write.
      rows: how many training images to show.
    """
    import jax

    from mixer_jax.run.config import ConfigError, check_config
    from mixer_jax.run.data import open_data
    from mixer_jax.visualize import draw_preview

    if rows < 1:
        raise UsageError(f"--rows is {rows}; 1 is the least.")
    jax.config.update("jax_platforms", "cpu")  # accelerators are for who trains
    loaded = load_config(config, overrides)
    try:
        check_config(loaded)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    data = open_data(loaded)
    draw_preview(
        output,
        title=f"What the model sees of {printable(loaded.dataset)}: "
        f"{loaded.pp.crop} x {loaded.pp.crop} pixels",
        train_source=data.train_source,
        test_source=data.test_source,
        train_transform=data.train_transform,
        eval_transform=data.eval_transform,
        class_names=data.class_names,
        seed=loaded.seed,
        num_rows=rows,
    )
    print(printable(output))


@app.command
def plan(
    config: str, topology: str, overrides: Overrides = (), num_classes: int = 1000
) -> None:
    """Compiles a training step for TPUs that need not be here: memory, work, bounds.

    Exits with 1 if the step does not fit.

    Args:
      config: such as configs/b16.py; its values can be set, as in
        --config.batch=512.
      topology: TPUs by generation and shape in chips, such as v5e:2x4 or v4:2x2x2, for
        which the extra tpu is needed; or "local", the devices that are here.
      num_classes: of the dataset, which is not opened.
    """
    import jax

    from mixer_jax import plan as planning
    from mixer_jax.run.config import ConfigError

    if topology != "local":
        jax.config.update("jax_platforms", "cpu")
    try:
        result = planning.plan(
            load_config(config, overrides),
            topology,
            num_classes,
            tell=lambda message: print(f"{message} ...", file=sys.stderr),
        )
    except (ConfigError, planning.PlanError) as error:
        raise UsageError(str(error)) from error
    print(result)
    if result.fits is False:
        sys.exit(1)


@app.command
def plot(
    workdirs: Positional[list[str]],
    output: pathlib.Path = pathlib.Path("metrics.png"),
) -> None:
    """Draws loss, accuracy, learning rate and speed of one or several runs by step.

    Args:
      workdirs: of the runs, which may still be going on.
      output: the PNG file to write.
    """
    from mixer_jax.visualize import draw_runs

    if not workdirs:
        raise UsageError("Name the workdir of a run, or of several.")
    try:
        draw_runs(output, workdirs)
    except ValueError as error:
        raise UsageError(str(error)) from error
    print(printable(output))


@app.command
def checkpoints() -> None:
    """Lists the published checkpoints."""
    rows = [("name", "model", "classes", "MB", "ImageNet top-1", "cached")]
    for name, file in PUBLISHED.items():
        sizes = file.sizes
        top1 = f"{file.paper_top1:.2f} %" if file.paper_top1 else "-"
        megabytes = f"{file.num_bytes / 1e6:.0f}"
        cached = "yes" if is_cached(name) else "no"
        rows.append(
            (name, str(sizes.variant), str(sizes.num_classes), megabytes, top1, cached)
        )
    _print_table(rows, "<<>>><")
    print(
        "\nTop-1 is the paper's, Table 3: fine-tuned on ImageNet at 224 pixels after "
        "the pre-training\nthat the folder names. No measurement of these files. They "
        f"are kept in\n{cache_dir()}"
    )


@app.command
def inspect(model: Model) -> None:
    """Tells a model's sizes, and lists its parameters. Fetches no published file."""
    if name := published_name(model):
        sizes, gelu = PUBLISHED[name].sizes, "tanh"
    else:
        loaded = load_model(model)
        sizes, gelu = infer_model(loaded.params), loaded.model.gelu
    shapes = sizes.shapes()
    counts = {key: math.prod(shape) for key, shape in shapes.items()}
    total = sum(counts.values())
    head = counts.get("head/kernel", 0) + counts.get("head/bias", 0)
    classes = f"{sizes.num_classes} classes" if sizes.num_classes else "none"
    print(f"model       {sizes}, {gelu} GELU")
    print(f"parameters  {total:,}, {total - head:,} without the head")
    print(f"head        {classes}\n")
    rows = [
        (key, " x ".join(map(str, shape)), f"{counts[key]:,}")
        for key, shape in shapes.items()
        if not key.startswith("MixerBlock_") or key.startswith("MixerBlock_0/")
    ]
    _print_table(rows, "<<>")
    if sizes.num_blocks > 1:
        print(
            f"\nMixerBlock_1 to MixerBlock_{sizes.num_blocks - 1} are as MixerBlock_0."
        )


def load_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """Reads a config as train.py does.

    Args:
      path: of the file, with an argument for it behind a colon if it takes one.
      overrides: such as "config.base_lr=0.01".

    Raises:
      UsageError: there is no such file, or an override does not fit the config.
    """
    file = pathlib.Path(path.partition(":")[0])
    if not file.is_file():
        raise UsageError(
            f"There is no config {file}. Expected one like configs/b16.py."
        )
    # Configs import configs.common from the folder that train.py is in: the one above
    # theirs, or where one is.
    sys.path[:0] = [str(file.absolute().parent.parent), os.getcwd()]
    argv = ["mixer-jax", f"--config={path}", *(f"--{x}" for x in overrides)]
    values = absl_flags.FlagValues()  # not the program's
    config = config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=argv
    )
    try:
        values(argv)
    except absl_flags.Error as error:
        raise UsageError(str(error)) from error
    except AttributeError as error:
        raise UsageError(f"The config has no key {error.args[0].args[0]}") from error
    return config.value


def _print_report(report: "Report", data: str, transform: EvalTransform) -> None:
    """Prints what was measured; of many classes only the ten worst."""
    metrics, names = report.metrics, report.class_names
    how = f"resize {transform.resize}, crop {transform.crop}"
    if transform.evaluation == "resize":
        how = f"to {transform.crop} x {transform.crop}"
    print(f"data       {data}, {metrics['count']:,.0f} images")
    print(f"transform  {transform.evaluation}, {how}")
    print(f"top-1      {metrics['top1']:.2%}")
    if len(names) > 5:
        print(f"top-5      {metrics['top5']:.2%}")
    print(f"loss       {metrics['loss']:.4f}\n")
    accuracies, counts = report.class_accuracies()
    shown = np.flatnonzero(counts)
    if len(shown) > 50:
        shown = shown[np.argsort(accuracies[shown], kind="stable")[:10]]
        print("The ten classes with the lowest accuracy (--json-file has all):")
    rows = [
        (names[i], f"{accuracies[i]:.2%}", f"{counts[i]:,}") for i in shown.tolist()
    ]
    _print_table([("class", "top-1", "images"), *rows], "<>>")


def _print_table(rows: Sequence[Sequence[str]], align: str) -> None:
    """Prints columns, each to the left or right as `align` has "<" or ">" for it."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = zip(row, align, widths, strict=True)
        print("  ".join(f"{x:{side}{width}}" for x, side, width in cells).rstrip())


def main() -> None:
    """Runs the subcommand that the command line names."""
    logging.basicConfig(format="%(levelname)s: %(message)s")
    absl_logging.set_verbosity(absl_logging.ERROR)  # of the libraries
    # tyro knows no flags whose names it is not told: overrides become positional.
    options = [x for x in sys.argv[1:] if not x.startswith("--config.")]
    overrides = [x for x in sys.argv[1:] if x.startswith("--config.")]
    try:
        app.cli(
            prog="mixer-jax",
            description="Uses models that mixer_jax has trained or can read.",
            args=[*options, *(x.removeprefix("--") for x in overrides)] or ["--help"],
        )
    except BrokenPipeError:  # whoever read our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (
        CheckpointError,
        DatasetError,
        ExportError,
        FileError,
        UsageError,
        OSError,
    ) as error:
        sys.exit(f"{type(error).__name__}: {error}")
