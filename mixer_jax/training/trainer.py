"""One run: `train_and_evaluate(config, workdir)`.

The loop reads evaluate, save, next batch, step. What a step depends on is in the state,
or follows from the config's seed and the step's number; so a run that was stopped goes
on as if it had not been.
"""

import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mixer_jax.data import pipeline, preprocess, sources
from mixer_jax.evaluation.classification import evaluate
from mixer_jax.model import REMAT_POLICIES, MlpMixer, Patches
from mixer_jax.training import losses, sharding
from mixer_jax.training.checkpointing import Checkpoints
from mixer_jax.training.metrics import MetricsWriter, Progress, logging_to
from mixer_jax.training.optimizer import (
    DECAY_TYPES,
    OPTIMIZERS,
    create_optimizer,
    create_schedule,
)
from mixer_jax.training.processes import first_process_first
from mixer_jax.training.step import (
    Metrics,
    TrainState,
    init_state,
    make_eval_step,
    make_train_step,
)
from mixer_jax.weights.npz import save_checkpoint
from mixer_jax.weights.published import find_checkpoint, load_pretrained

logger = logging.getLogger(__name__)

Config = Any  # an ml_collections.ConfigDict with the keys of configs/common.py


class ConfigError(ValueError):
    """A config that cannot be run, or not in this workdir."""


class NonFiniteError(ArithmeticError):
    """The loss or the gradient is infinite or not a number."""


class RunStopped(Exception):  # noqa: N818 - it is no error
    """A signal asked the run to stop, and its state has been saved."""


def train_and_evaluate(
    config: Config, workdir: str | os.PathLike[str]
) -> dict[str, float]:
    """Trains as `config` says, or goes on where the run in `workdir` stopped.

    Args:
      config: see configs/common.py.
      workdir: folder for checkpoints, metrics, logs and the result; made if needed.

    Returns:
      the last evaluation: `top1`, `top5`, `loss` and `count`.

    Raises:
      ConfigError: the config contradicts itself or the one in the workdir.
      DatasetError: the dataset is not there or not as expected.
      CheckpointError: the pre-trained parameters are not there or do not fit.
      NonFiniteError: loss or gradient are infinite or not a number.
      RunStopped: SIGTERM or Ctrl-C; the state has been saved.
    """
    start_time = time.monotonic()
    workdir = pathlib.Path(workdir).expanduser().absolute()
    config = for_platform(config, jax.devices()[0].platform)
    check_config(config)
    _check_workdir(config, workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    is_main = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(workdir, is_main))
        stop_requested = stack.enter_context(_stop_signals())
        mesh = sharding.create_mesh(config.mesh.fsdp)
        stack.enter_context(jax.set_mesh(mesh))
        data = first_process_first(lambda: _open_data(config))
        program = build_program(config, mesh, len(data.class_names))
        init_rng, rng = jax.random.split(jax.random.key(config.seed))
        rng = jax.device_put(rng, sharding.replicated(mesh))

        checkpoints = Checkpoints(workdir, config.keep_checkpoints)
        stack.enter_context(checkpoints)
        start_step = checkpoints.latest_step() or 0
        if start_step:
            state = checkpoints.restore(program.abstract_state)
            if start_step == config.total_steps:
                logger.info("This run is finished; evaluating it once more.")
            else:
                logger.info("start    where it stopped, at step %d", start_step)
        else:
            state = _initial_state(config, program, init_rng)
        _describe(config, mesh, state)
        _write_workdir(config, data.class_names, workdir)

        progress = Progress(start_step, config.total_steps, config.batch, is_main)
        stack.enter_context(contextlib.closing(progress))
        writer = MetricsWriter(workdir, start_step, enabled=is_main)
        stack.enter_context(contextlib.closing(writer))
        reader = _MetricsReader(writer, progress, config.progress_every, checkpoints)
        train_batches = data.train_batches(start_step)
        stack.enter_context(contextlib.closing(train_batches))

        step, results = start_step, {}
        while True:
            is_last = step == config.total_steps
            if is_last or (step > start_step and step % config.eval_every == 0):
                reader.flush()
                with progress.paused(), contextlib.closing(data.eval_batches()) as rows:
                    batches = (sharding.shard_batch(mesh, batch) for batch in rows)
                    results = evaluate(program.eval_step, state.params, batches)
                _report_evaluation(step, results, len(data.class_names), writer)
            stopping = stop_requested() or checkpoints.reached_preemption(step)
            due = is_last or stopping or step % config.checkpoint_every == 0
            if due and step > start_step:
                reader.flush()  # only a state with a finite loss is saved
                with progress.paused():
                    checkpoints.save(step, state)
            if is_last or stopping:
                break
            batch = sharding.shard_batch(mesh, next(train_batches))
            with jax.transfer_guard("disallow"):
                state, metrics = program.train_step(state, batch, rng)
            step += 1
            reader.push(step, metrics)

        checkpoints.wait()
        if not is_last:
            raise RunStopped(
                f"Stopped at step {step} of {config.total_steps}. The state is in "
                f"{checkpoints.path}; the same command goes on from there."
            )
        final = workdir / "final.npz"
        if step > start_step or not final.exists():
            _save_params(final, state.params, mesh)
        secs = time.monotonic() - start_time
        logger.info("Done in %.0f s. The parameters are in %s", secs, final)
        return results


# --- What a run is made of ---


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples of a run, as this process's batches.

    Attributes:
      class_names: of the labels.
      train_batches: maps the step to start at to training batches without end.
      eval_batches: makes the batches of the whole test split.
    """

    class_names: list[str]
    train_batches: Callable[[int], Any]
    eval_batches: Callable[[], Any]


def _open_data(config: Config) -> Data:
    dataset = sources.open_dataset(
        config.dataset,
        data_dir=config.tfds_data_dir,
        manual_dir=config.tfds_manual_dir,
    )
    train_default, test_default = sources.default_splits(config.dataset)
    train_split = config.pp.train or train_default
    test_split = config.pp.test or test_default
    train_source, test_source = dataset.split(train_split), dataset.split(test_split)
    logger.info(
        "data     %s: %s images to train on (%s), %s to test on (%s), %d classes",
        config.dataset,
        f"{len(train_source):,}",
        train_split,
        f"{len(test_source):,}",
        test_split,
        len(dataset.class_names),
    )
    shared = {
        "prefetch": config.prefetch,
        "process_index": jax.process_index(),
        "process_count": jax.process_count(),
    }
    train_transform = preprocess.TrainTransform(
        config.pp.crop,
        config.pp.area_range,
        config.pp.aspect_range,
        config.pp.flip,
        config.pp.transfer,
    )
    eval_transform = preprocess.EvalTransform(
        config.pp.crop, config.pp.evaluation, config.pp.resize, config.pp.transfer
    )
    return Data(
        list(dataset.class_names),
        lambda start_step: pipeline.train_batches(
            train_source,
            train_transform,
            batch_size=config.batch,
            seed=config.seed,
            start_step=start_step,
            **shared,
        ),
        lambda: pipeline.eval_batches(
            test_source, eval_transform, batch_size=config.batch_eval, **shared
        ),
    )


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config computes on a mesh, compiled when first called.

    Attributes:
      init: makes the state before the first step, from a key.
      train_step: see `mixer_jax.training.step.make_train_step`; donates the state.
      eval_step: see `mixer_jax.training.step.make_eval_step`.
      abstract_state: shapes, dtypes and shardings of the state.
    """

    init: Callable[[jax.Array], TrainState]
    train_step: Any
    eval_step: Any
    abstract_state: TrainState


def for_platform(config: Config, platform: str) -> Config:
    """Returns a copy in which no value of `config.model` is None.

    Args:
      config: see configs/common.py.
      platform: of the devices, such as "tpu".
    """
    config = config.copy_and_resolve_references()
    defaults = {"dtype": "float32", "remat": "none"}
    if platform == "tpu":
        defaults = {"dtype": "bfloat16", "remat": "blocks"}
    for name, value in defaults.items():
        if config.model[name] is None:
            config.model[name] = value
    return config


def build_program(
    config: Config, mesh: Mesh, num_classes: int, unroll: int = 1
) -> Program:
    """Returns the functions of the run that `config` describes.

    Args:
      config: see configs/common.py.
      mesh: see `mixer_jax.training.sharding.create_mesh`.
      num_classes: of the dataset.
      unroll: see `mixer_jax.training.step.make_train_step`.
    """
    platform = mesh.devices.flat[0].platform
    fields = for_platform(config, platform).model.to_dict()
    patches = Patches(tuple(fields.pop("patches")["size"]))
    model = MlpMixer(patches=patches, num_classes=num_classes, **fields)
    schedule = create_schedule(
        config.decay_type,
        config.base_lr,
        config.total_steps,
        config.warmup_steps,
        config.linear_end,
    )
    tx = create_optimizer(
        config.optimizer,
        schedule,
        grad_norm_clip=config.grad_norm_clip,
        optim_dtype=config.optim_dtype,
        weight_decay=config.weight_decay,
    )
    loss_fn = losses.softmax_cross_entropy
    image_shape = (config.pp.crop, config.pp.crop, 3)
    init = functools.partial(init_state, model, tx, image_shape=image_shape)
    try:
        abstract_state = jax.eval_shape(init, jax.random.key(0))
    except ValueError as error:  # the model says what does not fit
        raise ConfigError(str(error)) from error
    on_state = sharding.state_shardings(mesh, abstract_state)
    on_batch = sharding.batch_sharding(mesh)
    everywhere = sharding.replicated(mesh)
    return Program(
        init=jax.jit(init, out_shardings=on_state),
        train_step=jax.jit(
            make_train_step(model, tx, schedule, loss_fn, config.accum_steps, unroll),
            in_shardings=(on_state, on_batch, everywhere),
            out_shardings=(on_state, everywhere),
            donate_argnums=0,
            compiler_options=sharding.compiler_options(mesh),
        ),
        eval_step=jax.jit(
            make_eval_step(model, loss_fn),
            in_shardings=(on_state.params, on_batch),
            out_shardings=everywhere,
        ),
        abstract_state=jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            abstract_state,
            on_state,
        ),
    )


def _initial_state(config: Config, program: Program, rng: jax.Array) -> TrainState:
    """The state before the first step: from scratch, or with a file's parameters."""
    state = program.init(rng)
    if not config.pretrained_dir:
        return state
    path = first_process_first(
        lambda: find_checkpoint(config.pretrained_dir, config.model.model_name)
    )
    params = load_pretrained(path, state.params)

    def put(value: Any, old: jax.Array) -> jax.Array:
        if value is old:  # the head
            return old
        return jax.make_array_from_callback(
            old.shape, old.sharding, lambda index: value[index]
        )

    logger.info("start    from %s, with a new head", path)
    return state.replace(params=jax.tree.map(put, params, state.params))


def _save_params(path: pathlib.Path, params: Any, mesh: Mesh) -> None:
    """Writes parameters in the published layout, by one process."""
    everywhere = sharding.replicated(mesh)
    whole = jax.jit(lambda x: x, out_shardings=everywhere)(params)
    if jax.process_index() == 0:
        save_checkpoint(path, jax.device_get(whole))
    multihost_utils.sync_global_devices("final parameters written")


# --- What a run tells ---


class _MetricsReader:
    """Reads the metrics of a step while the device computes the next one."""

    def __init__(
        self,
        writer: MetricsWriter,
        progress: Progress,
        every: int,
        checkpoints: Checkpoints,
    ):
        self._writer, self._progress, self._every = writer, progress, every
        self._checkpoints = checkpoints
        self._pending: tuple[int, Metrics] | None = None

    def push(self, step: int, metrics: Metrics) -> None:
        self.flush()
        self._pending = (step, metrics)

    def flush(self) -> None:
        if self._pending is None:
            return
        step, metrics = self._pending
        self._pending = None
        values = {name: float(x) for name, x in jax.device_get(metrics).items()}
        if not all(math.isfinite(value) for value in values.values()):
            last_good = self._checkpoints.latest_step()
            raise NonFiniteError(
                f"Step {step}: loss {values['loss']}, gradient norm "
                f"{values['grad_norm']}. The last good checkpoint is "
                f"{self._checkpoints.path / str(last_good) if last_good else 'none'}. "
                "A lower base_lr, a longer warmup_steps or a lower grad_norm_clip may "
                "help; look for damaged values in pre-trained parameters too."
            )
        self._progress.update(step, values["loss"])
        if step % self._every == 0:
            per_sec = self._progress.report(step, values)
            row = {f"train/{name}": value for name, value in values.items()}
            self._writer.write(step, row | {"train/images_per_sec": per_sec})


def _report_evaluation(
    step: int, results: dict[str, float], num_classes: int, writer: MetricsWriter
) -> None:
    if num_classes <= 5:
        del results["top5"]
    top5 = f"top-5 {100 * results['top5']:.2f} %, " if "top5" in results else ""
    logger.info(
        "step %d  test: top-1 %.2f %%, %sloss %.4f, on %s images",
        step,
        100 * results["top1"],
        top5,
        results["loss"],
        f"{results['count']:,.0f}",
    )
    writer.write(step, {f"test/{name}": value for name, value in results.items()})


def _describe(config: Config, mesh: Mesh, state: TrainState) -> None:
    count = sum(x.size for x in jax.tree.leaves(state.params))
    logger.info(
        "model    %s: %s parameters, %d x %d pixels",
        config.model.model_name,
        f"{count:,}",
        config.pp.crop,
        config.pp.crop,
    )
    logger.info(
        "run      %s steps of %d images in %s on %d x %s, %d with a copy of the state",
        f"{config.total_steps:,}",
        config.batch,
        config.model.dtype,
        mesh.size,
        mesh.devices.flat[0].device_kind,
        mesh.shape["data"],
    )


# --- What a run refuses, and what stops it ---


def check_config(config: Config) -> None:
    """Raises ConfigError if the config's numbers cannot go together."""
    for name, value, choices in (
        ("optimizer", config.optimizer, OPTIMIZERS),
        ("decay_type", config.decay_type, DECAY_TYPES),
        ("pp.evaluation", config.pp.evaluation, preprocess.EVALUATIONS),
        ("pp.transfer", config.pp.transfer, preprocess.TRANSFERS),
        ("model.dtype", config.model.dtype, (None, "float32", "bfloat16")),
        ("model.remat", config.model.remat, (None, *REMAT_POLICIES)),
    ):
        if value not in choices:
            raise ConfigError(
                f"{name} is {value!r}; expected one of {', '.join(map(str, choices))}."
            )
    if config.pretrained_dir == "None":  # what a flag makes of it
        raise ConfigError("To start from scratch: --config.pretrained_dir=''.")
    devices = jax.device_count()
    for key in ("total_steps", "batch", "batch_eval", "accum_steps", "eval_every",
                "progress_every", "checkpoint_every", "keep_checkpoints"):  # fmt: skip
        if config[key] < 1:
            raise ConfigError(f"{key} is {config[key]}; expected at least 1.")
    for key, unit in (
        ("batch", config.accum_steps * devices),
        ("batch_eval", devices),
    ):
        if config[key] % unit:
            accum = f" and accum_steps {config.accum_steps}" if key == "batch" else ""
            raise ConfigError(
                f"{key} is {config[key]}; with {devices} devices{accum} it must be a "
                f"multiple of {unit}, such as {-(-config[key] // unit) * unit}."
            )


def _check_workdir(config: Config, workdir: pathlib.Path) -> None:
    path = workdir / "config.json"
    if not path.exists():
        return
    old, new = _flatten(json.loads(path.read_text())), _flatten(_as_json(config))
    missing = object()
    keys = [k for k in old | new if old.get(k, missing) != new.get(k, missing)]
    if keys:
        table = "\n".join(
            f"  {k}: {old.get(k, 'absent')} there, {new.get(k, 'absent')} now"
            for k in keys
        )
        raise ConfigError(
            f"{workdir} holds a run with another config:\n{table}\nTake another "
            "--workdir, or the same config to go on with that run."
        )


def _write_workdir(
    config: Config, class_names: list[str], workdir: pathlib.Path
) -> None:
    if jax.process_index() == 0:
        for name, content in (
            ("class_names.json", class_names),
            ("config.json", _as_json(config)),
        ):
            partial = workdir / f"{name}.partial"
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            partial.replace(workdir / name)


def _as_json(config: Config) -> dict[str, Any]:
    return json.loads(config.to_json())


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


@contextlib.contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Makes SIGTERM and Ctrl-C a request to stop after the step; a second one acts.

    Processes that must agree on the step hear of it through Orbax instead.
    """
    requested = threading.Event()

    def request(number: int, frame: Any) -> None:
        del frame
        if requested.is_set():
            raise KeyboardInterrupt
        requested.set()
        logger.info(
            "%s: stopping after this step. Once more to stop at once, without saving.",
            signal.Signals(number).name,
        )

    if (
        jax.process_count() > 1
        or threading.current_thread() is not threading.main_thread()
    ):
        yield lambda: False
        return
    old = {s: signal.signal(s, request) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield requested.is_set
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
