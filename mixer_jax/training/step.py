"""The state of a run, and the functions that are compiled: train and eval step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax

from mixer_jax.data.preprocess import scale
from mixer_jax.model import MlpMixer

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


class TrainState(flax.struct.PyTreeNode):
    """What a checkpoint holds.

    Attributes:
      step: number of updates done, int32 [].
      params: the model's parameters, in the published tree.
      opt_state: the optimizer's state.
    """

    step: jax.Array
    params: Any
    opt_state: optax.OptState


def init_state(
    model: MlpMixer,
    tx: optax.GradientTransformation,
    rng: jax.Array,
    image_shape: tuple[int, int, int],
) -> TrainState:
    """Returns the state before the first update.

    Args:
      model: the model.
      tx: the optimizer.
      rng: key of the parameters' initial values.
      image_shape: (height, width, channels).
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    params = model.init(rng, images, train=False)["params"]
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_train_step(
    model: MlpMixer,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_fn: Callable[[jax.Array, jax.Array], jax.Array],
    accum_steps: int = 1,
    unroll: int = 1,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Returns the function that makes one update.

    Args:
      model: the model.
      tx: the optimizer.
      schedule: tx's learning rate, to report it.
      loss_fn: maps logits [n, num_classes] and labels [n] to losses [n].
      accum_steps: the gradient is the mean over that many equal slices of the batch,
        computed one after the other to save memory.
      unroll: slices in the body of the loop over them; values are the same.

    Returns:
      A function of the state, a batch of `image` and `label`, and the run's key, that
      returns the next state and the metrics `loss`, `grad_norm` (before clipping) and
      `learning_rate`.
    """

    def mean_loss(params: Any, batch: Batch, rng: jax.Array) -> jax.Array:
        logits: Any = model.apply(
            {"params": params},
            to_model_input(batch["image"]),
            train=True,
            rngs={"dropout": rng},
        )
        return jnp.mean(loss_fn(logits, batch["label"]))

    def accumulate(params: Any, batch: Batch, rng: jax.Array) -> tuple[jax.Array, Any]:
        # Slice k takes rows k, k + accum_steps, … : of each device as many, so that no
        # row changes device.
        slices = jax.tree.map(
            lambda x: jnp.moveaxis(x.reshape(-1, accum_steps, *x.shape[1:]), 1, 0),
            batch,
        )

        def add_slice(total: Any, part: Any) -> tuple[Any, None]:
            piece, rng = part
            value_and_grads = jax.value_and_grad(mean_loss)(params, piece, rng)
            return jax.tree.map(jnp.add, total, value_and_grads), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        total, _ = jax.lax.scan(
            add_slice,
            zero,
            (slices, jax.random.split(rng, accum_steps)),
            unroll=unroll,
        )
        return jax.tree.map(lambda x: x / accum_steps, total)

    def train_step(
        state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[TrainState, Metrics]:
        rng = jax.random.fold_in(rng, state.step)
        if accum_steps == 1:
            loss, grads = jax.value_and_grad(mean_loss)(state.params, batch, rng)
        else:
            loss, grads = accumulate(state.params, batch, rng)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "learning_rate": schedule(state.step),
        }
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(
    model: MlpMixer, loss_fn: Callable[[jax.Array, jax.Array], jax.Array]
) -> Callable[[Any, Batch], Metrics]:
    """Returns the function that scores one batch.

    It maps parameters and a batch of `image`, `label` and `mask` to sums over the rows
    whose mask is 1: `top1`, `top5` (0 with at most five classes), `loss`, `count`.
    """

    def eval_step(params: Any, batch: Batch) -> Metrics:
        images, labels, mask = batch["image"], batch["label"], batch["mask"]
        logits: Any = model.apply(
            {"params": params}, to_model_input(images), train=False
        )
        # Rank of the label's logit; ties count against the model.
        own = jnp.take_along_axis(logits, labels[:, None], axis=-1)
        rank = jnp.sum(logits >= own, axis=-1)
        return {
            "top1": jnp.sum((rank <= 1) * mask),
            "top5": jnp.sum((rank <= 5) * mask) * (logits.shape[-1] > 5),
            "loss": jnp.sum(loss_fn(logits, labels) * mask),
            "count": jnp.sum(mask),
        }

    return eval_step


def to_model_input(images: jax.Array) -> jax.Array:
    """Scales uint8 images to [-1, 1]; float32 ones already are."""
    return scale(images) if images.dtype == jnp.uint8 else images
