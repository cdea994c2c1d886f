import jax
import numpy as np
import pytest

from mixer_jax.data.permute import permute_patches, permute_pixels
from mixer_jax.model import MlpMixer
from mixer_jax.variants import Patches


def indices(height: int, width: int) -> np.ndarray:
    """An image whose pixels are their own positions; channels, negated and not."""
    flat = np.arange(height * width).reshape(height, width, 1)
    return np.concatenate([flat, -flat], axis=2)


TRANSFORMS = {
    "patches": lambda image, seed=0: permute_patches(image, (4, 4), seed),
    "pixels": lambda image, seed=0: permute_pixels(image, seed),
}


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_moves_whole_pixels_and_loses_none(transform):
    out = transform(indices(12, 20))
    np.testing.assert_array_equal(np.sort(out[..., 0].ravel()), np.arange(240))
    np.testing.assert_array_equal(out[..., 0], -out[..., 1])
    assert (out != indices(12, 20)).any()


@pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS)
def test_one_permutation_for_all_images(transform):
    source = transform(indices(12, 20))[..., 0]
    for seed in range(3):
        image = np.random.default_rng(seed).random((12, 20, 3), np.float32)
        want = image.reshape(240, 3)[source]
        np.testing.assert_array_equal(transform(image), want)
        np.testing.assert_array_equal(transform(np.stack([image] * 2))[1], want)
    others = [transform(indices(12, 20), seed)[..., 0] for seed in range(1, 40)]
    assert all((other != source).any() for other in others)
    # Later and in another process too: nothing but the seed decides.
    np.testing.assert_array_equal(transform(indices(12, 20))[..., 0], source)


def test_pixels_stay_in_their_patch_in_one_order_for_all():
    out = permute_patches(indices(12, 20), (4, 4), seed=0)[..., 0]
    cut = lambda x: x.reshape(3, 4, 5, 4).swapaxes(1, 2).reshape(15, 16)
    patches, originals = cut(out), cut(indices(12, 20)[..., 0])
    np.testing.assert_array_equal(
        np.sort(np.sort(patches, axis=1), axis=0), np.sort(originals, axis=0)
    )
    offsets = patches - patches.min(1, keepdims=True)
    assert (offsets == offsets[0]).all()
    assert (offsets[0] != offsets[0, np.argsort(offsets[0])]).any()
    assert (patches.min(1) != originals.min(1)).any()


def test_a_mixer_with_permuted_weights_sees_no_difference(golden):
    """The reason why the first curve of figure 4 does not move."""
    data = golden.load("forward.npz")
    params = golden.tree(data, "params/")
    model = MlpMixer(Patches((4, 4)), 7, 3, 24, 10, 40)
    images = data["images"]
    permuted = np.stack([permute_patches(image, (4, 4), seed=5) for image in images])
    assert not np.allclose(
        model.apply({"params": params}, permuted, train=False),
        data["logits"],
        atol=1e-2,
    )

    height, width = images.shape[1:3]
    source = permute_patches(indices(height, width), (4, 4), seed=5)[..., 0]
    first = source[:4, :4]  # of the first patch: row and column of each pixel
    rows, columns = first // width % 4, first % width % 4
    kernel = params["stem"]["kernel"]
    params["stem"]["kernel"] = kernel[rows, columns]
    corner = source[::4, ::4].ravel()
    order = corner // width // 4 * (width // 4) + corner % width // 4
    for i in range(3):
        mixing = params[f"MixerBlock_{i}"]["token_mixing"]
        mixing["Dense_0"]["kernel"] = mixing["Dense_0"]["kernel"][order]
        mixing["Dense_1"] = jax.tree.map(lambda x: x[..., order], mixing["Dense_1"])
    np.testing.assert_allclose(
        model.apply({"params": params}, permuted, train=False),
        data["logits"],
        atol=1e-5,
    )


def test_patches_that_do_not_divide_the_image():
    with pytest.raises(ValueError, match=r"12x20 pixels.*8x8"):
        permute_patches(indices(12, 20), (8, 8), seed=0)
