"""The fixed permutations of pixels of the paper's figure 4.

A Mixer learns as well from shuffled patches as from images, since its weights can be
permuted to match; a CNN does not.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np

PERMUTATIONS = ("patches", "pixels")
PERMUTE_SEED = 0  # one permutation for all runs, whatever their seed


def create_permute(
    name: str | None, patch_size: Sequence[int]
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns the function that a config's pp.permute names, None for none.

    Args:
      name: one of PERMUTATIONS; None or "" for none.
      patch_size: (height, width) of the model's patches in pixels.
    """
    if name == "patches":
        height, width = patch_size
        return functools.partial(
            permute_patches, patch_size=(height, width), seed=PERMUTE_SEED
        )
    if name == "pixels":
        return functools.partial(permute_pixels, seed=PERMUTE_SEED)
    return None


def permute_patches(
    image: np.ndarray, patch_size: tuple[int, int], seed: int
) -> np.ndarray:
    """Shuffles the patches, and the pixels within each patch all in the same way.

    Args:
      image: [..., height, width, channels] of any type. The channels of a pixel stay
        together.
      patch_size: (height, width) of a patch in pixels; the model's, to leave its task
        unchanged.
      seed: names the permutation, one for all images of a size.

    Returns:
      An image or images of the same shape and type.

    Raises:
      ValueError: the patches do not divide the image.
    """
    *batch, height, width, channels = image.shape
    ph, pw = patch_size
    if height % ph or width % pw:
        raise ValueError(
            f"An image of {height}x{width} pixels cannot be cut into patches of "
            f"{ph}x{pw}. Resize it to a multiple of the patch."
        )
    rows, columns = height // ph, width // pw
    cut = (*batch, rows, ph, columns, pw, channels)
    patches = np.swapaxes(image.reshape(cut), -4, -3)  # [..., rows, columns, ph, pw, c]
    flat = patches.reshape(*batch, rows * columns, ph * pw, channels)
    order, pixel_order = _permutations(seed, rows * columns, ph * pw)
    flat = flat[..., order[:, None], pixel_order, :]
    return np.swapaxes(flat.reshape(patches.shape), -4, -3).reshape(image.shape)


def permute_pixels(image: np.ndarray, seed: int) -> np.ndarray:
    """Shuffles all pixels globally.

    Args:
      image: [..., height, width, channels] of any type. The channels of a pixel stay
        together.
      seed: names the permutation, one for all images of a size.

    Returns:
      An image or images of the same shape and type.
    """
    *batch, height, width, channels = image.shape
    (order,) = _permutations(seed, height * width)
    flat = image.reshape(*batch, height * width, channels)
    return flat[..., order, :].reshape(image.shape)


@functools.lru_cache(maxsize=16)  # drawing one takes longer than applying it
def _permutations(seed: int, *sizes: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.permutation(size) for size in sizes)
