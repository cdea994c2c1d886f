"""What one does to see how fast a run will be: benchmark."""

import json
import pathlib
import sys
from typing import Literal

from mixer_jax.cli.app import UsageError, app, print_table
from mixer_jax.cli.runs import Overrides, load_config
from mixer_jax.files import replace_when_whole
from mixer_jax.run.config import ConfigError

Part = Literal["start", "step", "input", "wait", "save", "predict"]
Source = Literal["config", "digits", "jpeg"]


@app.command
def benchmark(
    config: str,
    overrides: Overrides = (),
    parts: tuple[Part, ...] = ("start", "step", "input", "wait", "save", "predict"),
    repeats: int = 5,
    output: pathlib.Path | None = None,
    num_classes: int = 1000,
    sources: tuple[Source, ...] = ("config", "digits", "jpeg"),
    variants: tuple[str, ...] = (),
    batches: tuple[int, ...] = (),
    dtypes: tuple[str, ...] = (),
    sizes: tuple[int, ...] = (),
    predict_batches: tuple[int, ...] = (1, 32),
    folder: pathlib.Path | None = None,
) -> None:
    """Measures how fast a config's run is here, part by part; see docs/benchmarks.md.

    A figure is the median of all measurements; in brackets the least and the most.

    Args:
      config: such as configs/b16.py; its values can be set, as in --config.batch=8.
      parts: what to measure. start: from Python's start to the first step. step: the
        forward pass and the training step. input: the images alone. wait: the share of
        a run's time that it waits for images. save: checkpoints. predict: from files.
      repeats: measurements of each figure, at least 5.
      output: a JSON file to write, with versions and machine.
      num_classes: of the model, where no dataset is opened.
      sources: for input and wait: the config's dataset; digits, arrays in memory; jpeg,
        a folder of made-up photographs.
      variants: for step, instead of the config's, such as S/32 B/16.
      batches: for step, images of an update, instead of the config's.
      dtypes: for step, such as float32 bfloat16.
      sizes: for step, of images in pixels.
      predict_batches: for predict, images at a time.
      folder: on the disk to save to. Default: the system's for temporary files.
    """
    from mixer_jax.benchmark.parts import benchmark as measure
    from mixer_jax.benchmark.report import Row, as_json, as_table
    from mixer_jax.benchmark.start import StartError

    if output and output.is_dir():
        raise UsageError(f"--output is {output}, a folder; expected a file.")
    found: dict[str, list[Row]] = {}
    try:
        for name, rows in measure(
            load_config(config, overrides),
            parts=parts,
            repeats=repeats,
            num_classes=num_classes,
            sources=sources,
            variants=variants,
            batches=batches,
            dtypes=dtypes,
            sizes=sizes,
            predict_batches=predict_batches,
            folder=folder,
            progress=lambda text: print(f"measuring {text} ...", file=sys.stderr),
        ):
            found[name] = rows
            print(f"\n{name}")
            print_table(*as_table(rows))
    except (ConfigError, StartError) as error:
        raise UsageError(str(error)) from error
    report = as_json(found, config=config, overrides=list(overrides), repeats=repeats)
    print()
    for key in ("versions", "machine"):
        print(f"{key:9} {', '.join(f'{k} {x}' for k, x in report[key].items() if x)}")
    if output:
        with replace_when_whole(output) as partial:
            partial.write_text(json.dumps(report, indent=2) + "\n")
        print(f"{output}: all of it as JSON")
