"""The parts of a benchmark, in the order in which they are measured."""

import contextlib
import pathlib
import tempfile
from collections.abc import Callable, Iterator, Sequence

import jax

from mixer_jax.benchmark.images import write_images
from mixer_jax.benchmark.input import benchmark_input, benchmark_wait, with_dataset
from mixer_jax.benchmark.predict import benchmark_predict
from mixer_jax.benchmark.report import Row
from mixer_jax.benchmark.save import benchmark_save
from mixer_jax.benchmark.start import benchmark_start
from mixer_jax.benchmark.step import benchmark_step, sweep
from mixer_jax.benchmark.timing import LEAST_REPEATS
from mixer_jax.run.config import Config, ConfigError, check_config
from mixer_jax.run.data import open_data
from mixer_jax.run.program import check_run

# `start` comes first: its processes need the devices, which this one then takes.
PARTS = ("start", "step", "input", "wait", "save", "predict")
SOURCES = ("config", "digits", "jpeg")
IMAGES = 128  # made-up files in a split


def benchmark(
    config: Config,
    *,
    parts: Sequence[str] = PARTS,
    repeats: int = LEAST_REPEATS,
    num_classes: int = 1000,
    sources: Sequence[str] = SOURCES,
    variants: Sequence[str] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    sizes: Sequence[int] = (),
    predict_batches: Sequence[int] = (1, 32),
    folder: pathlib.Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Iterator[tuple[str, list[Row]]]:
    """Measures the parts of a run on the devices that are here.

    Args:
      config: see configs/common.py.
      parts: of PARTS.
      repeats: measurements of each figure.
      num_classes: of the model, where no dataset is opened.
      sources: of SOURCES, for `input` and `wait`: the config's dataset; digits, arrays
        in memory; and a folder of made-up JPEGs.
      variants: for `step`, see mixer_jax.benchmark.step.sweep; and the next three too.
      batches: images of an update.
      dtypes: of the activations.
      sizes: of images, in pixels.
      predict_batches: images at a time, for `predict`.
      folder: on the disk to save to, and for the JPEGs. None: the system's for
        temporary files. Nothing stays there.
      progress: called with the name of a part before it.

    Yields:
      The name of a table and its rows.

    Raises:
      ConfigError: the config contradicts itself, the model or the devices; or another
        argument makes no sense.
      DatasetError: the config's dataset is not there.
      StartError: a process of `start` failed.
    """
    # What cannot be measured is found before hours of measurements.
    _check(parts, sources, repeats, num_classes, predict_batches, folder)
    check_config(config)
    configs = sweep(config, variants, batches, dtypes, sizes) if "step" in parts else []
    has_input = bool({"input", "wait"} & set(parts))
    if "start" in parts or (has_input and "config" in sources):
        open_data(config)
    if "start" in parts:
        progress("start")
        rows, packages = benchmark_start(config, repeats)
        yield "start", rows
        yield "imports", packages

    configs = [check_run(x)[0] for x in configs]
    config, mesh = check_run(config)
    with contextlib.ExitStack() as stack:
        if "step" in parts:
            progress("step")
            yield "step", list(benchmark_step(configs, num_classes, repeats))
        stack.enter_context(jax.set_mesh(mesh))
        root = pathlib.Path(
            stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        )
        photos = with_dataset(config, str(root / "images"))
        if has_input or "predict" in parts:
            files = write_images(root / "images", IMAGES)
        by_source = {
            "config": config,
            "digits": with_dataset(config, "digits"),
            "jpeg": photos,
        }
        by_source = {name: by_source[name] for name in dict.fromkeys(sources)}
        if "input" in parts:
            progress("input")
            yield "input", list(benchmark_input(by_source, mesh, repeats))
        if "wait" in parts:
            progress("wait")
            yield "wait", list(benchmark_wait(by_source, mesh, repeats))
        if "save" in parts:
            progress("save")
            saves = benchmark_save(config, mesh, num_classes, root / "save", repeats)
            yield "save", [saves]
        if "predict" in parts:
            progress("predict")
            transform = open_data(photos).eval_transform
            rows = list(
                benchmark_predict(
                    config,
                    mesh,
                    num_classes,
                    transform,
                    files,
                    predict_batches,
                    repeats,
                )
            )
            yield "predict", rows


def _check(
    parts: Sequence[str],
    sources: Sequence[str],
    repeats: int,
    num_classes: int,
    predict_batches: Sequence[int],
    folder: pathlib.Path | None,
) -> None:
    for flag, given, known in (("parts", parts, PARTS), ("sources", sources, SOURCES)):
        if not given or not set(given) <= set(known):
            raise ConfigError(
                f"--{flag} is {' '.join(given) or 'empty'}; expected one or more of "
                f"{', '.join(known)}."
            )
    if repeats < LEAST_REPEATS:
        raise ConfigError(
            f"--repeats is {repeats}; {LEAST_REPEATS} is the least that says how far "
            "measurements lie apart."
        )
    for flag, least in (
        ("num_classes", num_classes),
        ("predict_batches", min(predict_batches, default=0)),
    ):
        if least < 1:
            raise ConfigError(f"--{flag.replace('_', '-')} is {least}; 1 is the least.")
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--folder is {folder}, which is no folder.")
