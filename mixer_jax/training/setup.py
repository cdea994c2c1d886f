"""From a config to what a run is made of: data, program, evaluators, first state."""

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
from jax.sharding import Mesh

from mixer_jax.data import pipeline, preprocess, sources
from mixer_jax.data.permute import PERMUTATIONS, create_permute
from mixer_jax.data.sources import DatasetError
from mixer_jax.evaluation.classification import evaluate
from mixer_jax.evaluation.fewshot import extract_features, fewshot_accuracies
from mixer_jax.model import REMAT_POLICIES, MlpMixer, Patches
from mixer_jax.training import losses, sharding
from mixer_jax.training.optimizer import (
    DECAY_TYPES,
    OPTIMIZERS,
    create_optimizer,
    create_schedule,
)
from mixer_jax.training.processes import first_process_first
from mixer_jax.training.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_feature_step,
    make_train_step,
)
from mixer_jax.weights.published import find_checkpoint, load_pretrained

logger = logging.getLogger(__name__)

LOSSES = {
    "softmax": losses.softmax_cross_entropy,
    "sigmoid": losses.sigmoid_cross_entropy,
}

Config = Any  # an ml_collections.ConfigDict with the keys of configs/common.py


class ConfigError(ValueError):
    """A config that cannot be run, or not in this workdir."""


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
    crops = [("pp", config.pp.evaluation, config.pp.resize)]
    for name, spec in config.evals.items():
        evaluation = spec.evaluation or config.pp.evaluation
        crops.append((f"evals.{name}", evaluation, spec.resize or config.pp.resize))
    for name, evaluation, size in crops:
        if evaluation != "resize" and size < config.pp.crop:
            raise ConfigError(
                f"{name}.resize is {size}; {evaluation} cuts {config.pp.crop} pixels "
                "(pp.crop) out of it, and needs at least as many."
            )
    if config.sam_rho and not all(factor for _, factor in config.lr_multipliers):
        raise ConfigError(
            "sam_rho and a factor of 0 in lr_multipliers do not go together: the "
            "sharpness of frozen parameters would count."
        )
    for key in ("batch", "batch_eval", "accum_steps", "eval_every",
                "progress_every", "checkpoint_every", "keep_checkpoints"):  # fmt: skip
        if config[key] < 1:
            raise ConfigError(f"{key} is {config[key]}; expected at least 1.")


def check_devices(config: Config, devices: int) -> None:
    """Raises ConfigError if so many devices cannot run the config."""
    if config.mesh.fsdp < 1 or devices % config.mesh.fsdp:
        raise ConfigError(
            f"mesh.fsdp is {config.mesh.fsdp}, which does not divide {devices} devices."
        )
    for key, unit in (
        ("batch", config.accum_steps * devices),
        ("batch_eval", devices),
    ):
        if config[key] % unit:
            accum = f" and accum_steps {config.accum_steps}" if key == "batch" else ""
            fewer = math.gcd(config.accum_steps, config[key] // devices)
            or_fewer = f" Or set accum_steps to {fewer}."
            raise ConfigError(
                f"{key} is {config[key]}; with {devices} devices{accum} it must be a "
                f"multiple of {unit}, such as {-(-config[key] // unit) * unit}."
                f"{or_fewer if config[key] % devices == 0 else ''}"
            )


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

    def train_batches(self, start_step: int, rows: Sequence[int]) -> Any:
        """Returns the given rows of training batches, without end."""
        return pipeline.train_batches(
            self.train_source,
            self.train_transform,
            batch_size=self.config.batch,
            seed=self.config.seed,
            start_step=start_step,
            prefetch=self.config.prefetch,
            rows=rows,
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
    if isinstance(data.train_source[0].label, tuple):
        raise DatasetError(
            f"{config.dataset} has several labels for an image; runs train on one."
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
    if config.warmup_steps >= config.total_steps:
        logger.warning(
            "warmup_steps is %d, of %d in all: the learning rate never gets to base_lr",
            config.warmup_steps,
            config.total_steps,
        )
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
        batch_size = min(config.batch_eval, smallest)
        batches = pipeline.eval_batches(
            source,
            transform,
            batch_size=batch_size,
            num_classes=several,
            prefetch=config.prefetch,
            rows=sharding.local_rows(mesh, batch_size),
        )
        with contextlib.closing(batches):
            yield from (sharding.shard_batch(mesh, batch) for batch in batches)

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
            compiler_options=sharding.compiler_options(mesh),
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


def initial_state(config: Config, program: Program, rng: jax.Array) -> TrainState:
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
