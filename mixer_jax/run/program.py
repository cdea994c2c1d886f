"""What a config computes on a mesh of devices."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mixer_jax.data.sizes import as_size
from mixer_jax.model import MlpMixer
from mixer_jax.run.chips import chip_of
from mixer_jax.run.config import (
    Config,
    ConfigError,
    check_config,
    check_devices,
    for_platform,
    normalization,
)
from mixer_jax.run.model import build_model
from mixer_jax.training import sharding
from mixer_jax.training.losses import LOSSES
from mixer_jax.training.optimizer import (
    PatternError,
    create_optimizer,
    create_schedule,
)
from mixer_jax.training.step import (
    LossFn,
    TrainState,
    init_state,
    make_eval_step,
    make_feature_step,
    make_train_step,
)

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Program:
    """What a config computes on a mesh, compiled when first called.

    Attributes:
      model: the model that is trained.
      loss_fn: see `mixer_jax.training.losses`.
      init: makes the state before the first step, from a key.
      train_step: see `mixer_jax.training.step.make_train_step`; donates the state.
      eval_step: see `mixer_jax.training.step.make_eval_step`.
      feature_step: see `mixer_jax.training.step.make_feature_step`.
      abstract_state: shapes, dtypes and shardings of the state.
    """

    model: MlpMixer
    loss_fn: LossFn
    init: Callable[[jax.Array], TrainState]
    train_step: Any
    eval_step: Any
    feature_step: Any
    abstract_state: TrainState


def check_run(config: Config) -> tuple[Config, Mesh]:
    """Returns a config for the devices here, and the mesh of them, if it can be run.

    Nothing is opened or compiled.

    Raises:
      ConfigError: the config contradicts itself, the model or the devices.
    """
    check_config(config)
    check_devices(config, jax.device_count())
    config = for_devices(config, jax.devices())
    mesh = sharding.create_mesh(config.mesh.fsdp)
    build_program(config, mesh, num_classes=1)
    return config, mesh


def for_devices(config: Config, devices: Sequence[Any]) -> Config:
    """Returns a copy with the dtype and remat of the model that suit the devices.

    remat is "none": to compute blocks a second time costs a sixth more operations and
    moves no fewer bytes (docs/scaling.md, "What remat costs"). It is "blocks" on a TPU
    whose memory could not hold the state, a gradient and what the matrix products of a
    slice leave. That is more than XLA keeps: 15.8 GB for 64 images of H/14 and a state
    over 8 chips, where its step needs 12.8.

    Args:
      config: see configs/common.py; checked.
      devices: that the run will have, or some like them.

    Raises:
      ConfigError: see `build_program`.
    """
    chosen = for_platform(config, devices[0].platform)
    hbm_bytes = chip_of(devices[0].device_kind).hbm_bytes
    is_open = config.model.get("remat", "") is None and not math.isnan(hbm_bytes)
    if is_open and _bytes_without_remat(chosen, devices) > hbm_bytes:
        chosen.model.remat = "blocks"
    return chosen


def _bytes_without_remat(config: Config, devices: Sequence[Any]) -> int:
    config = config.copy_and_resolve_references()
    config.model.remat = "dots"
    mesh = sharding.create_mesh(config.mesh.fsdp, devices)
    program = build_program(config, mesh, num_classes=1)
    state = program.abstract_state
    rows = config.batch // (config.accum_steps * len(devices))
    shape = (rows, *as_size(config.pp.crop), 3)

    def backward(params: Any, images: jax.Array, rng: jax.Array) -> Any:
        def forward(params: Any) -> Any:
            rngs = {"dropout": rng}
            return program.model.apply(
                {"params": params}, images, train=True, rngs=rngs
            )

        return jax.vjp(forward, params)[1]  # a tree of what it keeps of the forward

    images = jax.ShapeDtypeStruct(shape, jnp.float32)
    kept = jax.eval_shape(backward, state.params, images, jax.random.key(0))
    kept_bytes = sum(
        math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(kept)
    )
    return kept_bytes + sharding.bytes_per_device((state, state.params))


def build_program(
    config: Config, mesh: Mesh, num_classes: int, *, multilabel: bool = False
) -> Program:
    """Returns the functions of the run that `config` describes.

    Args:
      config: see configs/common.py; checked, with durations in steps.
      mesh: see `mixer_jax.training.sharding.create_mesh`.
      num_classes: of the dataset.
      multilabel: whether its images have several labels.

    Raises:
      ConfigError: config.model has a field that the model lacks, or lr_multipliers an
        expression that matches no parameter.
    """
    platform = mesh.devices.flat[0].platform
    fields = for_platform(config, platform).model.to_dict()
    model = build_model(fields, num_classes)
    rate = schedule(config)
    tx = create_optimizer(
        config.optimizer,
        rate,
        grad_norm_clip=config.grad_norm_clip,
        optim_dtype=config.optim_dtype,
        weight_decay=config.weight_decay,
        lr_multipliers=config.lr_multipliers,
    )
    loss_fn = LOSSES[config.loss]
    mean, std = normalization(config)
    init = functools.partial(
        init_state,
        model,
        tx,
        image_shape=(*as_size(config.pp.crop), 3),
        head_bias_init=config.head_bias_init,
    )
    try:
        abstract_state = jax.eval_shape(init, jax.random.key(0))
    except PatternError as error:
        raise ConfigError(str(error)) from error
    on_state = sharding.state_shardings(mesh, abstract_state)
    on_batch = sharding.batch_sharding(mesh)
    replicated = sharding.replicated(mesh)
    train_step = make_train_step(
        model,
        tx,
        rate,
        loss_fn,
        accum_steps=config.accum_steps,
        label_smoothing=config.label_smoothing,
        mixup_p=config.mixup_p,
        sam_rho=config.sam_rho,
        skip_nonfinite=config.on_nonfinite == "skip",
        mean=mean,
        std=std,
    )

    def jit_on_params(step: Callable[..., Any]) -> Any:
        return jax.jit(
            step, in_shardings=(on_state.params, on_batch), out_shardings=replicated
        )

    return Program(
        model=model,
        loss_fn=loss_fn,
        init=jax.jit(init, out_shardings=on_state),
        train_step=jax.jit(
            train_step,
            in_shardings=(on_state, on_batch, replicated),
            out_shardings=(on_state, replicated),
            donate_argnums=0,
            compiler_options=sharding.compiler_options(mesh),
        ),
        eval_step=jit_on_params(
            make_eval_step(model, loss_fn, multilabel=multilabel, mean=mean, std=std)
        ),
        feature_step=jit_on_params(make_feature_step(model, mean=mean, std=std)),
        abstract_state=jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where),
            abstract_state,
            on_state,
        ),
    )


def abstract_batch(config: Config, mesh: Mesh, rows: int) -> dict[str, Any]:
    """Returns shapes, dtypes and shardings of a batch with one label for each image.

    Args:
      config: see configs/common.py.
      mesh: see `build_program`.
      rows: images in the batch.
    """
    on_batch = sharding.batch_sharding(mesh)
    shape = (rows, *as_size(config.pp.crop), 3)
    dtype = jnp.uint8 if config.pp.transfer == "uint8" else jnp.float32
    return {
        "image": jax.ShapeDtypeStruct(shape, dtype, sharding=on_batch),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=on_batch),
    }


def schedule(config: Config) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    Args:
      config: see configs/common.py; with durations in steps.
    """
    return create_schedule(
        config.decay_type,
        config.base_lr,
        config.total_steps,
        config.warmup_steps,
        config.linear_end,
    )


def step_rng(config: Config, mesh: Mesh) -> jax.Array:
    """Returns the key from which every step draws, on all devices."""
    _, rng = jax.random.split(jax.random.key(config.seed))
    return jax.device_put(rng, sharding.replicated(mesh))


def log_program(config: Config, program: Program, mesh: Mesh, start_step: int) -> None:
    """Logs the model, its size, the length of the run and its devices."""
    count = sum(
        math.prod(x.shape) for x in jax.tree.leaves(program.abstract_state.params)
    )
    logger.info(
        "model    %s: %s parameters, %d x %d pixels",
        config.model.model_name,
        f"{count:,}",
        *as_size(config.pp.crop),
    )
    logger.info(
        "run      %s steps of %d images in %s on %d x %s%s",
        f"{config.total_steps:,}",
        config.batch,
        config.model.get("dtype", "the model's dtype"),
        mesh.size,
        mesh.devices.flat[0].device_kind,
        f", state split over {config.mesh.fsdp}" if config.mesh.fsdp > 1 else "",
    )
    if start_step == config.total_steps:
        logger.info("This run is finished; evaluating it once more.")
