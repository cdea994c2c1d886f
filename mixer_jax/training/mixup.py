"""Mixup (Zhang et al., 2018, https://arxiv.org/abs/1710.09412) as in big_vision."""

import jax
import jax.numpy as jnp


def mixup(
    rng: jax.Array, images: jax.Array, labels: jax.Array, p: float
) -> tuple[jax.Array, jax.Array]:
    """Mixes each example with the one before it, in one proportion λ for the batch.

    λ is drawn from Beta(p, p), and replaced by max(λ, 1 - λ), so that each example is
    the larger part of its mixture.

    Args:
      rng: a key, the same in all processes.
      images: [batch, ...], floating point.
      labels: [batch, num_classes], probabilities.
      p: of the Beta distribution, above 0. A larger p mixes more.

    Returns:
      λ x + (1 - λ) roll(x, 1) of both, in their types.

    Raises:
      ValueError: p is not positive, images are integers, or labels are not
        [batch, num_classes] in floating point.
    """
    if p <= 0:
        raise ValueError(
            f"mixup got p={p}, but Beta(p, p) needs p > 0. To train without mixup, do "
            "not call it."
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise ValueError(
            f"mixup got images in {images.dtype}, but mixes floating point. Scale them "
            "first."
        )
    floating = jnp.issubdtype(labels.dtype, jnp.floating)
    if labels.ndim != 2 or len(labels) != len(images) or not floating:
        raise ValueError(
            f"mixup got labels of shape {labels.shape} in {labels.dtype} for "
            f"{len(images)} images, but mixes probabilities, [batch, num_classes] "
            "in floating point. Convert integer labels with jax.nn.one_hot."
        )
    ratio = jax.random.beta(rng, p, p)
    ratio = jnp.maximum(ratio, 1 - ratio)

    def mix(x: jax.Array) -> jax.Array:
        return (ratio * x + (1 - ratio) * jnp.roll(x, 1, axis=0)).astype(x.dtype)

    return mix(images), mix(labels)
