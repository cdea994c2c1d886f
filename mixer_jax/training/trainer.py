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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from mixer_jax.data import pipeline, preprocess, sources
from mixer_jax.data.permute import PERMUTATIONS, create_permute
from mixer_jax.evaluation.classification import evaluate
from mixer_jax.evaluation.fewshot import extract_features, fewshot_accuracies
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
    make_feature_step,
    make_train_step,
)
from mixer_jax.weights.npz import save_checkpoint
from mixer_jax.weights.published import find_checkpoint, load_pretrained

logger = logging.getLogger(__name__)

LOSSES = {
    "softmax": losses.softmax_cross_entropy,
    "sigmoid": losses.sigmoid_cross_entropy,
}

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
      the last evaluation of the test split: `top1`, `top5`, `loss` and `count`.

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
    saved_config = _as_json(config)
    workdir.mkdir(parents=True, exist_ok=True)
    is_main = jax.process_index() == 0
    with contextlib.ExitStack() as stack:
        stack.enter_context(logging_to(workdir, is_main))
        stop_requested = stack.enter_context(_stop_signals())
        mesh = sharding.create_mesh(config.mesh.fsdp)
        stack.enter_context(jax.set_mesh(mesh))
        data = first_process_first(lambda: open_data(config))
        config = in_steps(config, len(data.train_source))
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
        _write_workdir(saved_config, data.class_names, workdir)
        evaluators = open_evaluators(config, data, program, mesh)

        progress = Progress(start_step, config.total_steps, config.batch, is_main)
        stack.enter_context(contextlib.closing(progress))
        writer = MetricsWriter(workdir, start_step, enabled=is_main)
        stack.enter_context(contextlib.closing(writer))
        epoch = len(data.train_source) / config.batch  # in steps
        reader = _MetricsReader(
            writer, progress, config.progress_every, epoch, checkpoints
        )
        train_batches = data.train_batches(start_step)
        stack.enter_context(contextlib.closing(train_batches))

        step = start_step
        results: dict[str, dict[str, float]] = {}
        while True:
            is_last = step == config.total_steps
            for evaluator in evaluators:
                if is_last or (step > start_step and step % evaluator.every == 0):
                    reader.flush()
                    with progress.paused():
                        results[evaluator.name] = evaluator.run(state.params)
                    _report_evaluation(step, evaluator, results, writer)
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
        return results["test"]


# --- What a run is made of ---


@dataclasses.dataclass(frozen=True)
class Data:
    """The examples of a run, and what becomes of them.

    Attributes:
      config: of the run.
      class_names: of the labels.
      train_source: the examples to train on.
      test_source: the examples to test on.
      train_transform: from an image to what the model sees in training.
      eval_transform: from an image to what it sees in evaluation.
    """

    config: Config
    class_names: Sequence[str]
    train_source: sources.Source
    test_source: sources.Source
    train_transform: preprocess.TrainTransform
    eval_transform: preprocess.EvalTransform

    def train_batches(self, start_step: int) -> Any:
        """Returns this process's rows of training batches, without end."""
        return pipeline.train_batches(
            self.train_source,
            self.train_transform,
            batch_size=self.config.batch,
            seed=self.config.seed,
            start_step=start_step,
            prefetch=self.config.prefetch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )


def open_data(config: Config) -> Data:
    """Returns the data that `config` describes.

    Raises:
      DatasetError: the dataset or a split is not there, or not as expected.
    """
    dataset = sources.open_dataset(
        config.dataset,
        data_dir=config.tfds_data_dir,
        manual_dir=config.tfds_manual_dir,
    )
    train_default, test_default = sources.default_splits(config.dataset)
    train_split = config.pp.train or train_default
    test_split = config.pp.test or test_default
    permute = create_permute(config.pp.permute, config.model.patches.size)
    data = Data(
        config,
        list(dataset.class_names),
        dataset.split(train_split),
        dataset.split(test_split),
        preprocess.TrainTransform(
            config.pp.crop,
            config.pp.area_range,
            config.pp.aspect_range,
            config.pp.flip,
            config.pp.transfer,
            config.pp.randaugment,
            permute,
        ),
        preprocess.EvalTransform(
            config.pp.crop,
            config.pp.evaluation,
            config.pp.resize,
            config.pp.transfer,
            permute,
        ),
    )
    logger.info(
        "data     %s: %s images to train on (%s), %s to test on (%s), %d classes",
        config.dataset,
        f"{len(data.train_source):,}",
        train_split,
        f"{len(data.test_source):,}",
        test_split,
        len(data.class_names),
    )
    return data


def in_steps(config: Config, num_examples: int) -> Config:
    """Returns `config` with total_steps and warmup_steps set.

    Each may be given in steps, epochs or examples instead.

    Args:
      config: of the run.
      num_examples: of the training split, an epoch.

    Raises:
      ConfigError: a duration is given twice, or the run has none.
    """
    config = ml_collections.ConfigDict(config)
    for name in ("total", "warmup"):
        images = {"steps": config.batch, "epochs": num_examples, "examples": 1}
        given = {
            f"{name}_{unit}": (config[f"{name}_{unit}"], size)
            for unit, size in images.items()
            if config[f"{name}_{unit}"]
        }
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(f'{k} {v}' for k, (v, _) in given.items())}: give one "
                "of them, and set the others to 0."
            )
        steps = [round(value * size / config.batch) for value, size in given.values()]
        config[f"{name}_steps"] = sum(steps)
    if config.total_steps < 1:
        raise ConfigError("The run has no steps: give total_steps or total_epochs.")
    return config


@dataclasses.dataclass(frozen=True)
class Evaluator:
    """One way to score parameters during a run.

    Attributes:
      name: of the numbers, as in "test/top1".
      every: steps between two evaluations.
      run: maps the parameters to numbers by name.
    """

    name: str
    every: int
    run: Callable[[Any], dict[str, float]]


def open_evaluators(
    config: Config, data: Data, program: "Program", mesh: Mesh
) -> list[Evaluator]:
    """Returns the evaluator of the test split, and those that config.evals adds.

    Raises:
      ConfigError: an evaluator cannot be.
      DatasetError: its dataset or split is not there, or not as expected.
    """
    num_classes = len(data.class_names)

    def batches(
        source: sources.Source, transform: preprocess.EvalTransform, several: int | None
    ) -> Iterator[dict[str, jax.Array]]:
        # A split smaller than a batch is not padded to a whole one.
        smallest = -(-len(source) // mesh.size) * mesh.size
        rows = pipeline.eval_batches(
            source,
            transform,
            batch_size=min(config.batch_eval, smallest),
            num_classes=several,
            prefetch=config.prefetch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )
        with contextlib.closing(rows):
            yield from (sharding.shard_batch(mesh, batch) for batch in rows)

    def classify(
        source: sources.Source,
        transform: preprocess.EvalTransform,
        several: int | None,
        params: Any,
    ) -> dict[str, float]:
        return evaluate(program.eval_step, params, batches(source, transform, several))

    def probe(
        train: sources.Source,
        test: sources.Source,
        classes: int,
        shots: Sequence[int],
        transform: preprocess.EvalTransform,
        params: Any,
    ) -> dict[str, float]:
        train_features, test_features = (
            extract_features(program.feature_step, params, batches(x, transform, None))
            for x in (train, test)
        )
        accuracies = fewshot_accuracies(*train_features, *test_features, classes, shots)
        return {f"{shot}shot": accuracy for shot, accuracy in accuracies.items()}

    test = functools.partial(classify, data.test_source, data.eval_transform, None)
    evaluators = [Evaluator("test", config.eval_every, test)]
    for name, spec in config.evals.items():
        dataset = sources.open_dataset(
            spec.dataset or config.dataset,
            data_dir=config.tfds_data_dir,
            manual_dir=config.tfds_manual_dir,
            label_key=spec.label_key,
        )
        transform = dataclasses.replace(
            data.eval_transform,
            evaluation=spec.evaluation or config.pp.evaluation,
            resize=spec.resize or config.pp.resize,
        )
        source, classes = dataset.split(spec.split), len(dataset.class_names)
        if spec.type == "fewshot":
            train = dataset.split(spec.train_split)
            train = sources.first_of_each_class(train, classes, max(spec.shots))
            run = functools.partial(
                probe, train, source, classes, spec.shots, transform
            )
        elif spec.type != "classification":
            raise ConfigError(
                f"evals.{name}.type is {spec.type!r}; expected classification or "
                "fewshot."
            )
        elif classes != num_classes:
            raise ConfigError(
                f"evals.{name} has {classes} classes, and the run {num_classes}: the "
                "head cannot be scored there. Take type fewshot, or another dataset."
            )
        else:
            several = classes if isinstance(source[0].label, tuple) else None
            run = functools.partial(classify, source, transform, several)
        evaluators.append(Evaluator(name, spec.every or config.eval_every, run))
    return evaluators


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config computes on a mesh, compiled when first called.

    Attributes:
      init: makes the state before the first step, from a key.
      train_step: see `mixer_jax.training.step.make_train_step`; donates the state.
      eval_step: see `mixer_jax.training.step.make_eval_step`.
      feature_step: see `mixer_jax.training.step.make_feature_step`.
      abstract_state: shapes, dtypes and shardings of the state.
    """

    init: Callable[[jax.Array], TrainState]
    train_step: Any
    eval_step: Any
    feature_step: Any
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
        lr_multipliers=config.lr_multipliers,
    )
    loss_fn = LOSSES[config.loss]
    init = functools.partial(
        init_state,
        model,
        tx,
        image_shape=(config.pp.crop, config.pp.crop, 3),
        head_bias_init=config.head_bias_init,
    )
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
            make_train_step(
                model,
                tx,
                schedule,
                loss_fn,
                accum_steps=config.accum_steps,
                label_smoothing=config.label_smoothing,
                mixup_p=config.mixup_p,
                sam_rho=config.sam_rho,
                unroll=unroll,
            ),
            in_shardings=(on_state, on_batch, everywhere),
            out_shardings=(on_state, everywhere),
            donate_argnums=0,
        ),
        eval_step=jax.jit(
            make_eval_step(model, loss_fn),
            in_shardings=(on_state.params, on_batch),
            out_shardings=everywhere,
        ),
        feature_step=jax.jit(
            make_feature_step(model),
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
        epoch_steps: float,
        checkpoints: Checkpoints,
    ):
        self._writer, self._progress = writer, progress
        self._every, self._epoch_steps = every, epoch_steps
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
            values["images_per_sec"] = self._progress.report(step, values)
            values["epoch"] = step / self._epoch_steps
            self._writer.write(step, {f"train/{k}": v for k, v in values.items()})


def _report_evaluation(
    step: int,
    evaluator: Evaluator,
    results: dict[str, dict[str, float]],
    writer: MetricsWriter,
) -> None:
    numbers = results[evaluator.name]
    count = f", on {numbers['count']:,.0f} images" if "count" in numbers else ""
    shown = [
        f"loss {value:.4f}"
        if name == "loss"
        else f"{name.replace('top', 'top-').replace('shot', '-shot')} {value:.2%}"
        for name, value in numbers.items()
        if name != "count"
    ]
    logger.info("step %d  %s: %s%s", step, evaluator.name, ", ".join(shown), count)
    writer.write(step, {f"{evaluator.name}/{k}": v for k, v in numbers.items()})


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
        ("loss", config.loss, tuple(LOSSES)),
        ("pp.permute", config.pp.permute or "", ("", *PERMUTATIONS)),
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
    for key in ("batch", "batch_eval", "accum_steps", "eval_every",
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
    config: dict[str, Any], class_names: Sequence[str], workdir: pathlib.Path
) -> None:
    if jax.process_index() == 0:
        for name, content in (
            ("class_names.json", list(class_names)),
            ("config.json", config),
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
