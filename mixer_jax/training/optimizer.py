"""Learning-rate schedules and optimizers, from Optax."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

T = TypeVar("T")

# The learning rate after the warm-up, from base_lr, linear_end and the share of the
# steps that are done, 0 to 1.
DECAYS: dict[str, Callable[[jax.Array, float, jax.Array], jax.Array]] = {
    "cosine": lambda lr, end, done: lr * 0.5 * (1.0 + jnp.cos(jnp.pi * done)),
    "linear": lambda lr, end, done: end + (lr - end) * (1.0 - done),
    "constant": lambda lr, end, done: lr,
}

# The scaling of the gradient, from optim_dtype.
OPTIMIZERS: dict[str, Callable[[str], optax.GradientTransformation]] = {
    "sgd": lambda dtype: optax.trace(decay=0.9, accumulator_dtype=dtype),
    "adam": lambda dtype: optax.scale_by_adam(b1=0.9, b2=0.999, mu_dtype=dtype),
}


class PatternError(ValueError):
    """An expression of lr_multipliers that decides for no parameter."""


def create_schedule(
    decay_type: str,
    base_lr: float,
    total_steps: int,
    warmup_steps: int,
    linear_end: float = 1e-5,
) -> optax.Schedule:
    """Returns the learning rate as a function of the step, counted from 0.

    It is a linear warm-up from 0 over `warmup_steps`, times a decay that starts where
    the warm-up ends (vit_jax, big_vision).

    Args:
      decay_type: "cosine" to 0, "linear" to linear_end, or "constant".
      base_lr: highest learning rate.
      total_steps: where the decay ends.
      warmup_steps: 0 for none.
      linear_end: learning rate at the end of a linear decay.

    Raises:
      ValueError: decay_type is none of these.
    """
    decay = _choose("decay_type", decay_type, DECAYS)

    def schedule(step: jax.Array) -> jax.Array:
        done = (step - warmup_steps) / max(total_steps - warmup_steps, 1)
        done = jnp.clip(done, 0.0, 1.0)
        lr = decay(jnp.asarray(base_lr, jnp.float32), linear_end, done)
        return lr * jnp.minimum(1.0, step / warmup_steps) if warmup_steps else lr

    return schedule


def create_optimizer(
    name: str,
    schedule: optax.Schedule,
    *,
    grad_norm_clip: float | None = 1.0,
    optim_dtype: str = "bfloat16",
    weight_decay: float = 0.0,
    lr_multipliers: Sequence[tuple[str, float]] = (),
) -> optax.GradientTransformation:
    """Returns the optimizer.

    Args:
      name: "sgd" with momentum 0.9 (fine-tuning, paper section 3), or "adam" with
        beta 0.9 and 0.999 (pre-training, paper appendix A).
      schedule: learning rate by step.
      grad_norm_clip: highest global norm of the gradient; None for no limit.
      optim_dtype: of the momentum, or of Adam's first moment.
      weight_decay: of kernels, decoupled: a step subtracts
        learning rate * weight_decay * kernel. big_vision's figure is this one times
        its base learning rate.
      lr_multipliers: pairs of a regular expression and a factor. The first expression
        that matches the whole name of a parameter, such as
        "MixerBlock_0/LayerNorm_0/scale", gives the factor of its learning rate. A
        factor of 0 freezes parameters: they have no optimizer state, and do not count
        in the gradient's norm.

    Raises:
      ValueError: there is no optimizer of that name.
      PatternError: from the optimizer's init, an expression matches no parameter.
    """
    scale = _choose("optimizer", name, OPTIMIZERS)(optim_dtype)
    clip = optax.clip_by_global_norm(grad_norm_clip) if grad_norm_clip else None
    decay = (
        optax.add_decayed_weights(weight_decay, _is_kernel) if weight_decay else None
    )
    steps = [clip, scale, decay, optax.scale_by_learning_rate(schedule)]
    tx = optax.chain(*(step for step in steps if step is not None))
    if not lr_multipliers:
        return tx

    def factors(params: Any) -> Any:
        return _match(lr_multipliers, params)

    def trained(params: Any) -> Any:
        return jax.tree.map(lambda factor: factor != 0, factors(params))

    def frozen(params: Any) -> Any:
        return jax.tree.map(lambda factor: factor == 0, factors(params))

    multiply = optax.stateless(
        lambda updates, params: jax.tree.map(
            lambda update, factor: update * factor, updates, factors(params)
        )
    )
    return optax.chain(
        optax.masked(tx, trained), optax.masked(optax.set_to_zero(), frozen), multiply
    )


def _choose(key: str, name: str, choices: Mapping[str, T]) -> T:
    if name not in choices:
        raise ValueError(f"{key} is {name!r}; expected one of {', '.join(choices)}.")
    return choices[name]


def _match(lr_multipliers: Sequence[tuple[str, float]], params: Any) -> Any:
    """Returns the factor of each parameter, as a tree."""
    unused = {pattern for pattern, _ in lr_multipliers}

    def factor(path: Any, param: Any) -> float:
        del param
        name = "/".join(key.key for key in path)
        for pattern, value in lr_multipliers:
            if re.fullmatch(pattern, name):
                unused.discard(pattern)
                return value
        return 1.0

    tree = jax.tree_util.tree_map_with_path(factor, params)
    if unused:
        raise PatternError(
            f"lr_multipliers: {', '.join(sorted(unused))} decides for no parameter. "
            "An expression must match a whole name, such as 'head/kernel', and only "
            "the first one that matches a name counts."
        )
    return tree


def _is_kernel(params: Any) -> Any:
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key == "kernel", params
    )
