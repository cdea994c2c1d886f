"""The state of a run, and the functions that are compiled: train and eval step."""

from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from einops import rearrange

from mixer_jax.data.preprocess import HALF, Color, scale
from mixer_jax.model import MlpMixer
from mixer_jax.training.losses import smooth_labels
from mixer_jax.training.mixup import mixup

Batch = dict[str, jax.Array]
LossFn = Callable[[jax.Array, jax.Array], jax.Array]
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
    head_bias_init: float = 0.0,
) -> TrainState:
    """Returns the state before the first update.

    Args:
      model: the model.
      tx: the optimizer.
      rng: key of the parameters' initial values.
      image_shape: (height, width, channels).
      head_bias_init: initial value of the head's bias. For the sigmoid loss about
        -log(number of classes), so that every class starts improbable (big_vision).
    """
    images = jnp.zeros((1, *image_shape), jnp.float32)
    params = model.init(rng, images, train=False)["params"]
    if model.num_classes:
        params["head"]["bias"] += head_bias_init
    return TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))


def make_loss_and_grads(
    model: MlpMixer, loss_fn: LossFn, *, mean: Color = HALF, std: Color = HALF
) -> Callable[[Any, Batch, jax.Array], tuple[jax.Array, Any]]:
    """Returns the function that computes a batch's mean loss and its gradient.

    It maps parameters, a batch of `image` and `label`, and the key for dropout and
    stochastic depth to the loss [] and the tree of gradients. For `mean` and `std` see
    `to_model_input`.
    """

    def mean_loss(params: Any, batch: Batch, rng: jax.Array) -> jax.Array:
        logits: Any = model.apply(
            {"params": params},
            to_model_input(batch["image"], mean, std),
            train=True,
            rngs={"dropout": rng},
        )
        return jnp.mean(loss_fn(logits, batch["label"]))

    return jax.value_and_grad(mean_loss)


def make_train_step(
    model: MlpMixer,
    tx: optax.GradientTransformation,
    schedule: optax.Schedule,
    loss_fn: LossFn,
    *,
    accum_steps: int = 1,
    label_smoothing: float = 0.0,
    mixup_p: float = 0.0,
    sam_rho: float = 0.0,
    skip_nonfinite: bool = False,
    mean: Color = HALF,
    std: Color = HALF,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """Returns the function that makes one update.

    Args:
      model: the model.
      tx: the optimizer.
      schedule: tx's learning rate, to report it.
      loss_fn: see `mixer_jax.training.losses`.
      accum_steps: number of equal slices of the batch, computed one after the other to
        save memory. The gradient is their mean.
      label_smoothing: see `mixer_jax.training.losses.smooth_labels`.
      mixup_p: see `mixer_jax.training.mixup`; 0 for none.
      sam_rho: the update takes the gradient at params + sam_rho * gradient / its norm
        (sharpness-aware minimization, https://arxiv.org/abs/2010.01412, equation 2);
        0 for none.
      skip_nonfinite: where the loss or the gradient is infinite or not a number, the
        parameters and the optimizer stay as they were; only `step` counts on.
      mean: see `to_model_input`.
      std: see `to_model_input`.

    Returns:
      A function of the state, a batch of `image` and `label`, and the run's key, that
      returns the next state and the metrics `loss`, `grad_norm` (before clipping),
      `param_norm` (before the update) and `learning_rate`; with `skip_nonfinite` also
      `skipped`, 1 if the update was left out and else 0.
    """
    loss_and_grads_of_slice = make_loss_and_grads(model, loss_fn, mean=mean, std=std)

    def augment(batch: Batch, rng: jax.Array) -> Batch:
        images, labels = batch["image"], batch["label"]
        if label_smoothing or mixup_p:
            assert model.num_classes, "a model without a head cannot be trained"
            if labels.ndim == 1:
                labels = jax.nn.one_hot(labels, model.num_classes)
            labels = smooth_labels(labels, label_smoothing)
        if mixup_p:
            images = to_model_input(images, mean, std)
            images, labels = mixup(rng, images, labels, mixup_p)
        return {"image": images, "label": labels}

    def loss_and_grads(
        params: Any, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, Any]:
        if accum_steps == 1:
            return loss_and_grads_of_slice(params, batch, rng)

        # Slice k takes rows k, k + accum_steps, …: equally many of each device, so that
        # no row moves to another one.
        pattern = "(rows slices) ... -> slices rows ..."
        slices = jax.tree.map(
            lambda x: rearrange(x, pattern, slices=accum_steps), batch
        )

        def add_slice(total: Any, one: Any) -> tuple[Any, None]:
            loss_and_grads = loss_and_grads_of_slice(params, *one)
            return jax.tree.map(jnp.add, total, loss_and_grads), None

        zero = (jnp.zeros((), jnp.float32), jax.tree.map(jnp.zeros_like, params))
        rngs = jax.random.split(rng, accum_steps)
        total, _ = jax.lax.scan(add_slice, zero, (slices, rngs))
        return jax.tree.map(lambda x: x / accum_steps, total)

    def train_step(
        state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[TrainState, Metrics]:
        rng, augment_rng = jax.random.split(jax.random.fold_in(rng, state.step))
        batch = augment(batch, augment_rng)
        loss, grads = loss_and_grads(state.params, batch, rng)
        if sam_rho:
            radius = sam_rho / jnp.maximum(optax.tree.norm(grads), 1e-12)
            nearby = jax.tree.map(lambda p, g: p + radius * g, state.params, grads)
            _, grads = loss_and_grads(nearby, batch, rng)
        # The optimizer's own count, as it does not count skipped steps.
        (_, num_updates), *_ = optax.tree.get_all_with_path(state.opt_state, "count")
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        metrics = {
            "loss": loss,
            "grad_norm": optax.tree.norm(grads),
            "param_norm": optax.tree.norm(state.params),
            "learning_rate": schedule(num_updates),
        }
        if skip_nonfinite:
            is_good = jnp.isfinite(loss) & jnp.isfinite(metrics["grad_norm"])
            metrics["skipped"] = 1.0 - is_good
            params, opt_state = jax.tree.map(
                lambda new, old: jnp.where(is_good, new, old),
                (params, opt_state),
                (state.params, state.opt_state),
            )
        return TrainState(state.step + 1, params, opt_state), metrics

    return train_step


def make_eval_step(
    model: MlpMixer,
    loss_fn: LossFn,
    *,
    multilabel: bool = False,
    report: bool = False,
    mean: Color = HALF,
    std: Color = HALF,
) -> Callable[[Any, Batch], dict[str, Any]]:
    """Returns the function that scores one batch.

    It maps parameters and a batch of `image`, `label` and `mask` to what `sum_scores`
    returns. Where numbers need more than sums, the entry `rows` has `label` and `mask`
    as well, with

    - `logits` [batch, num_classes], if `multilabel`: mean average precision compares
      all examples;
    - `prediction` int [batch], if `report`; see `predict_classes`.

    For `mean` and `std` see `to_model_input`.
    """

    def eval_step(params: Any, batch: Batch) -> dict[str, Any]:
        images = to_model_input(batch["image"], mean, std)
        logits: Any = model.apply({"params": params}, images, train=False)
        scores: dict[str, Any] = {
            **sum_scores(logits, batch, loss_fn, multilabel=multilabel)
        }
        if multilabel or report:
            scores["rows"] = {"label": batch["label"], "mask": batch["mask"]}
        if multilabel:
            scores["rows"]["logits"] = logits
        if report:
            scores["rows"]["prediction"] = predict_classes(logits)
        return scores

    return eval_step


def sum_scores(
    logits: jax.Array, batch: Batch, loss_fn: LossFn, *, multilabel: bool = False
) -> Metrics:
    """Scores the logits of a batch.

    Args:
      logits: [batch, num_classes].
      batch: `label` and `mask` [batch]. Labels are classes, integer [batch]. If images
        may have several, they are [batch, num_classes], 1 for each class of an image
        and 0 elsewhere: an image is right if any of these comes first.
      loss_fn: see `mixer_jax.training.losses`.
      multilabel: whether all labels of an image are to be found, as in a run that
        trains on several. The loss is then that of the labels as they are; otherwise
        that of their uniform mixture, a distribution of one class.

    Returns:
      Sums over the rows whose mask is 1: `top1`, `top5` (of more than five classes; see
      `rank_labels`), `loss`, `count`; with `multilabel` also `labelled`, the images
      that have a label, since the others have nothing that could come first.
    """
    labels, mask = batch["label"], batch["mask"]
    sums = {}
    if labels.ndim == 1:
        rank = rank_labels(logits, labels)
    else:
        is_labelled = jnp.any(labels > 0, axis=-1)
        likeliest = jnp.argmax(jnp.where(labels > 0, logits, -jnp.inf), axis=-1)
        rank = rank_labels(logits, jnp.where(is_labelled, likeliest, -1))
        if multilabel:
            sums["labelled"] = jnp.sum(is_labelled * mask)
        else:
            labels = labels / jnp.maximum(jnp.sum(labels, axis=-1, keepdims=True), 1)
    sums["top1"] = jnp.sum((rank < 1) * mask)
    if logits.shape[-1] > 5:
        sums["top5"] = jnp.sum((rank < 5) * mask)
    sums["loss"] = jnp.sum(loss_fn(logits, labels) * mask)
    sums["count"] = jnp.sum(mask)
    return sums


def rank_labels(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns how many classes come before each label, int [batch].

    Classes come in the order of their logits, the highest first; of equal logits the
    first, as in argmax. An image with a NaN among its logits is never right: all
    classes come before its label. `predict_classes` follows the same rule.

    Args:
      logits: [batch, num_classes].
      labels: integer [batch]; -1 for none, before which all classes come.
    """
    # No top_k here: XLA would gather the logits of all devices on each.
    logit = jnp.take_along_axis(logits, labels[:, None], axis=-1)
    is_earlier = jnp.arange(logits.shape[-1])[None] < labels[:, None]
    is_before = (logits > logit) | ((logits == logit) & is_earlier)
    is_wrong = jnp.any(jnp.isnan(logits), axis=-1) | (labels < 0)
    return jnp.where(is_wrong, logits.shape[-1], jnp.sum(is_before, axis=-1))


def predict_classes(logits: jax.Array) -> jax.Array:
    """Returns the class that comes first, int [batch]; -1 where a logit is NaN."""
    is_nan = jnp.any(jnp.isnan(logits), axis=-1)
    return jnp.where(is_nan, -1, jnp.argmax(logits, axis=-1))


def make_feature_step(
    model: MlpMixer, *, mean: Color = HALF, std: Color = HALF
) -> Callable[[Any, Batch], Batch]:
    """Returns the function that adds pre_logits, as `feature`, to a batch.

    It maps parameters and a batch with `image` to the batch with `feature`
    [batch, hidden_dim] in its place. For `mean` and `std` see `to_model_input`.
    """

    def feature_step(params: Any, batch: Batch) -> Batch:
        images = to_model_input(batch["image"], mean, std)
        _, state = model.apply(
            {"params": params}, images, train=False, mutable=["intermediates"]
        )
        others = {key: value for key, value in batch.items() if key != "image"}
        return others | {"feature": state["intermediates"]["pre_logits"][0]}

    return feature_step


def to_model_input(
    images: jax.Array, mean: Color = HALF, std: Color = HALF
) -> jax.Array:
    """Scales uint8 images, to [-1, 1] by default; float32 images are scaled already.

    Args:
      images: [batch, height, width, 3].
      mean: of red, green and blue, in units of [0, 1].
      std: their standard deviations.
    """
    return scale(images, mean, std) if images.dtype == jnp.uint8 else images
