"""What one does before a run: data check, data preview, plan."""

import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

import tyro
from absl import flags as absl_flags
from ml_collections import config_flags
from tqdm import tqdm
from tyro.conf import Positional

from mixer_jax.cli.app import UsageError, app, data_app, print_table
from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.names import printable
from mixer_jax.data.sizes import as_size
from mixer_jax.run.config import ConfigError, check_config
from mixer_jax.run.config_file import parse_flags

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
    print_table(summarize(checked, opened.class_names), "<<>>>>")
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
      output: the file to write, .png or .svg.
      rows: how many training images to show.
    """
    import jax

    from mixer_jax.run.data import open_data
    from mixer_jax.visualize import draw_preview, save_figure
    from mixer_jax.visualize.files import check_figure_path

    if rows < 1:
        raise UsageError(f"--rows is {rows}; 1 is the least.")
    check_figure_path(output)
    jax.config.update("jax_platforms", "cpu")  # accelerators are for who trains
    loaded = load_config(config, overrides)
    try:
        check_config(loaded)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    data = open_data(loaded)
    figure = draw_preview(
        title=f"What the model sees of {printable(loaded.dataset)}: "
        f"{' x '.join(map(str, as_size(loaded.pp.crop)))} pixels",
        train_source=data.train_source,
        test_source=data.test_source,
        train_transform=data.train_transform,
        eval_transform=data.eval_transform,
        class_names=data.class_names,
        seed=loaded.seed,
        num_rows=rows,
    )
    save_figure(figure, output)
    print(printable(output))


@app.command
def plan(
    config: str,
    topology: str,
    overrides: Overrides = (),
    num_classes: int = 1000,
    best: bool = False,
) -> None:
    """Compiles a training step for TPUs that you do not have: memory, work, bounds.

    If the step does not fit, tries what makes it fit, and exits with 1.

    Args:
      config: such as configs/b16.py; its values can be set, as in
        --config.batch=512.
      topology: TPUs by generation and shape in chips, such as v5e:2x4 or v4:2x2x2 (this
        needs the extra tpu), or "local" for the devices of this machine.
      num_classes: of the dataset, which is not opened.
      best: look for the fastest remat, accum_steps and mesh.fsdp instead of the
        config's. Exits with 1 if none fits.
    """
    import jax

    from mixer_jax import plan as planning
    from mixer_jax import plan_search

    if num_classes < 1:
        raise UsageError(f"--num-classes is {num_classes}; 1 is the least.")
    if topology != "local":
        jax.config.update("jax_platforms", "cpu")
        # JAX keeps a program for devices that are not here, but cannot read it again.
        jax.config.update("jax_enable_compilation_cache", False)

    def progress(message: str) -> None:
        print(f"{message} ...", file=sys.stderr)

    loaded = load_config(config, overrides)
    given = (loaded, topology, num_classes)
    known = []
    try:
        if not best:
            known.append(planning.plan(*given, progress=progress))
            print(known[0])
            if known[0].fits is not False:
                return
            print("\nIt does not fit. Looking for what does:", flush=True)
        tried = plan_search.find_best(*given, known=known, progress=progress)
    except (ConfigError, planning.PlanError) as error:
        raise UsageError(str(error)) from error
    fastest = plan_search.fastest(tried)
    if best and fastest:
        print(fastest, end="\n\n")
    print(plan_search.compare(tried))
    if fastest is None or not best:
        sys.exit(1)


def load_config(path: str, overrides: Sequence[str] = ()) -> Any:
    """Reads a config as train.py does.

    Args:
      path: of the file, with an argument for it behind a colon if it takes one.
      overrides: such as "config.base_lr=0.01".

    Raises:
      UsageError: there is no such file, it raises an error, or an override does not
        fit it.
    """
    file = pathlib.Path(path.partition(":")[0])
    if not file.is_file():
        raise UsageError(
            f"There is no config {file}. Expected one like configs/b16.py."
        )
    argv = ["mixer-jax", f"--config={path}", *(f"--{x}" for x in overrides)]
    values = absl_flags.FlagValues()  # not the program's
    config = config_flags.DEFINE_config_file(
        "config", flag_values=values, sys_argv=argv
    )
    try:
        parse_flags(values, argv)
    except ConfigError as error:
        raise UsageError(str(error)) from error
    return config.value
