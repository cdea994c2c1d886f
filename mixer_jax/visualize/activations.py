"""How much images activate the hidden units of a token-mixing MLP."""

import itertools
from collections.abc import Iterable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from mixer_jax.run.loading import LoadedModel
from mixer_jax.training.step import to_model_input
from mixer_jax.visualize.show import displayable
from mixer_jax.visualize.weights import UNITS

BATCH = 16


class Activations(NamedTuple):
    """How much images activate the hidden units of a token-mixing MLP.

    Attributes:
      of_image: float32 [units], of one image.
      of_images: float32 [images, units], of those to compare it with.
      images: uint8 [images, height, width, 3], as the model sees them.
    """

    of_image: np.ndarray
    of_images: np.ndarray
    images: np.ndarray


def unit_activations(
    loaded: LoadedModel,
    image: np.ndarray,
    block: int,
    images: Iterable[np.ndarray],
) -> Activations:
    """Returns how much images activate the hidden units of a token-mixing MLP.

    A unit is applied to each channel of the tokens. Its activation is the highest of
    all channels, before the GELU.

    Args:
      loaded: a model whose block has a token-mixing MLP.
      image: as the model's transform gives it.
      block: its number.
      images: uint8 [height, width, 3] each; the transform is applied.

    Raises:
      ValueError: there are no images.
    """
    path = tuple(UNITS.format(block).split("/")[:-1])
    transform = loaded.transform
    params = jax.device_put(loaded.params)

    @jax.jit
    def activate(images: jax.Array) -> jax.Array:
        _, state = loaded.model.apply(
            {"params": params},
            to_model_input(images, transform.mean, transform.std),
            train=False,
            capture_intermediates=lambda module, _: module.path == path,
            mutable="intermediates",
        )
        captured = traverse_util.flatten_dict(state["intermediates"])
        (hidden,) = captured[(*path, "__call__")]
        hidden = hidden.reshape(len(images), -1, hidden.shape[-1])
        return hidden.max(1).astype(jnp.float32)  # of [images, channels, units]

    (of_image,) = np.asarray(activate(jnp.asarray(image)[None]))
    others: list[np.ndarray] = []
    rows: list[np.ndarray] = []
    transformed = map(transform, images)
    while batch := list(itertools.islice(transformed, BATCH)):
        blanks = [batch[0]] * (BATCH - len(batch))  # so that one program is compiled
        rows.append(np.asarray(activate(np.stack(batch + blanks)))[: len(batch)])
        others += [displayable(x, transform) for x in batch]
    if not others:
        raise ValueError("There are no images to compare with.")
    return Activations(of_image, np.concatenate(rows), np.stack(others))
