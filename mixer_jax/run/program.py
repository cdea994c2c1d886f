"""What a config computes on a mesh of devices."""

import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from mixer_jax.model import MlpMixer
from mixer_jax.run.config import LOSSES, Config, ConfigError, for_platform
from mixer_jax.run.model import build_model
from mixer_jax.training import sharding
from mixer_jax.training.optimizer import create_optimizer, create_schedule
from mixer_jax.training.processes import first_process_first
from mixer_jax.training.step import (
    LossFn,
    TrainState,
    init_state,
    make_eval_step,
    make_feature_step,
    make_train_step,
)
from mixer_jax.weights.published import find_checkpoint, load_pretrained

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


def build_program(config: Config, mesh: Mesh, num_classes: int) -> Program:
    """Returns the functions of the run that `config` describes.

    Args:
      config: see configs/common.py.
      mesh: see `mixer_jax.training.sharding.create_mesh`.
      num_classes: of the dataset.
    """
    platform = mesh.devices.flat[0].platform
    fields = for_platform(config, platform).model.to_dict()
    model = build_model(fields, num_classes)
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
        model=model,
        loss_fn=loss_fn,
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
    """Returns the state before the first step, with a file's parameters if configured.

    Raises:
      OSError, CheckpointError: as `find_checkpoint` and `load_pretrained`.
    """
    state = program.init(rng)
    if not config.pretrained_dir:
        return state
    path = first_process_first(
        lambda: find_checkpoint(config.pretrained_dir, config.model.model_name)
    )
    params = load_pretrained(path, state.params)

    def put(value: Any, old: jax.Array) -> jax.Array:
        if value is old:  # the head, and what the file does not have
            return old
        return jax.make_array_from_callback(
            old.shape, old.sharding, lambda index: value[index]
        )

    logger.info("start    from %s, with a new head", path)
    return state.replace(params=jax.tree.map(put, params, state.params))
