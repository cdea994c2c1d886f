"""The fixed permutations of pixels of the paper's figure 4.

A Mixer learns from images with shuffled patches as well as from images, since a
permutation of its weights undoes the shuffling. A CNN does not.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
from einops import rearrange

PERMUTE_SEED = 0  # the same permutation in all runs, whatever their seed


def create_permute(
    name: str | None, patch_size: Sequence[int]
) -> Callable[[np.ndarray], np.ndarray] | None:
    """Returns the function that a config's pp.permute names, None for none.

    Args:
      name: one of PERMUTATIONS; None or "" for none.
      patch_size: (height, width) of the model's patches in pixels.
    """
    if not name:
        return None
    return functools.partial(PERMUTATIONS[name], patch_size=tuple(patch_size))


def permute_patches(
    image: np.ndarray, patch_size: tuple[int, int], seed: int
) -> np.ndarray:
    """Shuffles the patches, and the pixels of each patch in one order for all patches.

    Args:
      image: [..., height, width, channels] of any type. The channels of a pixel stay
        together.
      patch_size: (height, width) of a patch in pixels; to leave the model's task
        unchanged, that of its patches.
      seed: selects the permutation, the same for all images of a size.

    Returns:
      An image or images of the same shape and type.

    Raises:
      ValueError: the height or width is not a multiple of the patch's.
    """
    height, width = image.shape[-3:-1]
    ph, pw = patch_size
    if height % ph or width % pw:
        raise ValueError(
            f"An image of {height}x{width} pixels cannot be cut into patches of "
            f"{ph}x{pw}. Resize it to a multiple of the patch."
        )
    patches = rearrange(
        image, "... (row ph) (col pw) c -> ... (row col) (ph pw) c", ph=ph, pw=pw
    )
    order, pixel_order = _permutations(seed, *patches.shape[-3:-1])
    patches = patches[..., order[:, None], pixel_order, :]
    return rearrange(
        patches,
        "... (row col) (ph pw) c -> ... (row ph) (col pw) c",
        row=height // ph,
        ph=ph,
    )


def permute_pixels(image: np.ndarray, seed: int) -> np.ndarray:
    """Shuffles all pixels.

    Args:
      image: [..., height, width, channels] of any type. The channels of a pixel stay
        together.
      seed: selects the permutation, the same for all images of a size.

    Returns:
      An image or images of the same shape and type.
    """
    pixels = rearrange(image, "... height width c -> ... (height width) c")
    (order,) = _permutations(seed, pixels.shape[-2])
    return pixels[..., order, :].reshape(image.shape)


# The choices for pp.permute: functions of an image and of the model's patch_size.
PERMUTATIONS: dict[str, Callable[..., np.ndarray]] = {
    "patches": lambda image, patch_size: permute_patches(
        image, patch_size, PERMUTE_SEED
    ),
    "pixels": lambda image, patch_size: permute_pixels(image, PERMUTE_SEED),
}


@functools.lru_cache(maxsize=16)  # to draw one takes longer than to apply it
def _permutations(seed: int, *sizes: int) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(seed)
    return tuple(rng.permutation(size) for size in sizes)
