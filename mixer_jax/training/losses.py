"""Losses of classification, one value for each example, in float32."""

import jax
import jax.numpy as jnp
import optax


def softmax_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross-entropy of labels and softmax(logits), as vit_jax fine-tunes with.

    Args:
      logits: [batch, num_classes], of any floating-point type.
      labels: classes, integer [batch], or their probabilities, [batch, num_classes].

    Returns:
      [batch] in float32. NaN where an integer label is num_classes or more.

    Raises:
      ValueError: the shape or type of labels is neither.
    """
    _check_labels(logits, labels)
    logits = logits.astype(jnp.float32)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return optax.softmax_cross_entropy(logits, labels.astype(jnp.float32))


def sigmoid_cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """Binary cross-entropies of labels and sigmoid(logits), summed over classes.

    big_vision pre-trains Mixer with it. Initialise the head's bias to about
    -log(num_classes), -6.9 for ImageNet. With a bias of 0 every class starts at a
    probability of 1/2, and the first steps only bring that down.

    Args:
      logits: [batch, num_classes], of any floating-point type.
      labels: classes, integer [batch], or probabilities, [batch, num_classes], which
        need not sum to 1.

    Returns:
      [batch] in float32.

    Raises:
      ValueError: the shape or type of labels is neither.
    """
    _check_labels(logits, labels)
    logits = logits.astype(jnp.float32)
    if jnp.issubdtype(labels.dtype, jnp.integer):
        labels = jax.nn.one_hot(labels, logits.shape[-1])
    losses = optax.sigmoid_binary_cross_entropy(logits, labels.astype(jnp.float32))
    return losses.sum(-1)


# The choices of config.loss, by name.
LOSSES = {"softmax": softmax_cross_entropy, "sigmoid": sigmoid_cross_entropy}


def smooth_labels(labels: jax.Array, eps: float) -> jax.Array:
    """Label smoothing: (1 - eps) labels + eps / num_classes.

    Args:
      labels: [batch, num_classes], probabilities.
      eps: the part that is spread evenly over all classes, the true one included
        (Szegedy et al., 2016, https://arxiv.org/abs/1512.00567, section 7); 0 for none.

    Returns:
      [batch, num_classes]. Rows that summed to 1 still do.

    Raises:
      ValueError: eps is not in [0, 1], or labels are integers.
    """
    if not 0 <= eps <= 1:
        raise ValueError(f"Label smoothing got eps={eps}; it must be from 0 to 1.")
    if not jnp.issubdtype(labels.dtype, jnp.floating):
        raise ValueError(
            f"Label smoothing got labels in {labels.dtype}, but works on "
            "probabilities, [batch, num_classes]. Convert integer labels with "
            "jax.nn.one_hot."
        )
    return (1 - eps) * labels + eps / labels.shape[-1]


def _check_labels(logits: jax.Array, labels: jax.Array) -> None:
    integers = jnp.issubdtype(labels.dtype, jnp.integer)
    expected = logits.shape[:-1] if integers else logits.shape
    if labels.shape != expected:
        raise ValueError(
            f"Labels of shape {labels.shape} in {labels.dtype} do not fit logits of "
            f"shape {logits.shape}. Labels are integer classes of shape "
            f"{logits.shape[:-1]} or floating-point probabilities of shape "
            f"{logits.shape}."
        )
