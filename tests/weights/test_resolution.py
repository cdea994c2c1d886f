import dataclasses
import functools
import math
import re

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from einops import rearrange

import mixer_jax
from mixer_jax.data.interpolate import resample
from mixer_jax.model import MlpMixer
from mixer_jax.variants import Patches
from mixer_jax.weights import layout, npz
from mixer_jax.weights.layout import CheckpointError
from mixer_jax.weights.resolution import adapt

from ..examples import import_gating_fork

MODEL = MlpMixer(Patches((4, 4)), 5, 2, 12, 10, 20)


def random_params(model, image_size, seed=0):
    """Parameters that differ everywhere, with activations of about 1."""
    rng = np.random.default_rng(seed)
    shapes = layout.shapes_of_model(model, (*image_size, 3))

    def draw(key, shape):
        fan_in = math.prod(shape[:-1]) if key.endswith("kernel") else 25
        values = rng.standard_normal(shape, "float32") / np.float32(fan_in**0.5)
        return values + np.float32(key.endswith("scale"))

    return layout.unflatten({key: draw(key, shape) for key, shape in shapes.items()})


def draw_images(image_size, n=2, seed=1):
    rng = np.random.default_rng(seed)
    return rng.uniform(-1, 1, (n, *image_size, 3)).astype("float32")


@functools.partial(jax.jit, static_argnums=0)
def apply(model, params, images):
    return model.apply(
        {"params": params}, images, train=False, capture_intermediates=True
    )


def run(model, params, images):
    """Logits, pre_logits, and the tokens after each block."""
    logits, state = apply(model, params, images)
    state = state["intermediates"]
    blocks = [
        np.asarray(state[f"MixerBlock_{i}"]["__call__"][0])
        for i in range(model.num_blocks)
        if f"MixerBlock_{i}" in state
    ]
    return np.asarray(logits), np.asarray(state["pre_logits"][0]), blocks


def shapes_for(model, image_size):
    return layout.shapes_of_model(model, (*image_size, 3))


@pytest.mark.parametrize(
    ("grid", "factors"),
    [((4, 4), (2, 2)), ((4, 4), (3, 3)), ((3, 5), (2, 3))],
)
def test_block_diagonal_sees_each_tile_as_the_old_model_does(grid, factors):
    """Appendix C, exactly: every block's tokens, and the mean of the tiles."""
    (h, w), (kh, kw) = grid, factors
    old_size, new_grid = (4 * h, 4 * w), (kh * h, kw * w)
    model = MODEL.clone(tokens_mlp_dim=kh * kw * MODEL.tokens_mlp_dim)
    image_size = (kh * old_size[0], kw * old_size[1])
    params = random_params(MODEL, old_size)
    shapes = shapes_for(model, image_size)
    adapted = adapt(params, shapes, new_grid, "block_diagonal", grid=grid)
    assert layout.shapes_of(adapted) == shapes

    images = draw_images(image_size)
    tiles = rearrange(images, "n (kh h) (kw w) c -> (n kh kw) h w c", kh=kh, kw=kw)
    _, pre_logits, blocks = run(model, adapted, images)
    _, old_pre_logits, old_blocks = run(MODEL, params, tiles)
    assert len(blocks) == 2
    for tokens, old_tokens in zip(blocks, old_blocks, strict=True):
        tokens = rearrange(
            tokens,
            "n (kh h kw w) c -> (n kh kw) (h w) c",
            kh=kh, kw=kw, h=h, w=w,
        )  # fmt: skip
        np.testing.assert_allclose(tokens, old_tokens, rtol=0, atol=1e-5)
    expected = rearrange(old_pre_logits, "(n k) c -> n k c", k=kh * kw).mean(axis=1)
    np.testing.assert_allclose(pre_logits, expected, rtol=0, atol=1e-5)
    # It is no trivial equality: tiles differ, and so do the orders of tokens.
    assert np.ptp(old_pre_logits, axis=0).min() > 1e-3


def test_adapted_parameters_run_in_scanned_blocks():
    model = MODEL.clone(tokens_mlp_dim=40)
    params = random_params(MODEL, (16, 16))
    shapes = shapes_for(model, (32, 32))
    adapted = adapt(params, shapes, (8, 8), "block_diagonal")
    images = draw_images((32, 32))
    scanned = run(model.clone(scan_blocks=True), adapted, images)
    np.testing.assert_allclose(
        scanned[1], run(model, adapted, images)[1], rtol=0, atol=1e-5
    )


def test_block_diagonal_has_the_old_kernels_on_its_diagonal(tiny):
    """In the order of tiles; everything else is zero, and biases are repeated."""
    params = tiny.tree()
    shapes = tiny.sizes_with(num_tokens=64, tokens_mlp_dim=24).shapes()
    adapted = layout.flatten(adapt(params, shapes, (8, 8), "block_diagonal"))
    old = layout.flatten(params)
    for i, axes in ((0, ("tokens", "units")), (1, ("units", "tokens"))):
        key = f"MixerBlock_1/token_mixing/Dense_{i}"
        kernel, bias = adapted[f"{key}/kernel"], adapted[f"{key}/bias"]
        for axis, kind in enumerate(axes):
            if kind == "tokens":
                kernel = np.stack(
                    [
                        kernel.take(8 * row + column, axis)
                        for top in (0, 4)
                        for left in (0, 4)
                        for row in range(top, top + 4)
                        for column in range(left, left + 4)
                    ],
                    axis,
                )
        np.testing.assert_array_equal(kernel, np.kron(np.eye(4), old[f"{key}/kernel"]))
        if axes[1] == "tokens":
            bias = rearrange(bias, "(k h l w) -> (k l) (h w)", k=2, l=2, h=4)
        else:
            bias = rearrange(bias, "(k units) -> k units", k=4)
        np.testing.assert_array_equal(bias, np.stack(4 * [old[f"{key}/bias"]]))


@pytest.mark.parametrize("resolution", ["block_diagonal", "interpolate"])
def test_the_same_size_is_the_identity(tiny, resolution, assert_same):
    params = tiny.tree()
    adapted = adapt(params, tiny.sizes.shapes(), (4, 4), resolution)
    assert_same(adapted, params)
    new, old = layout.flatten(adapted), layout.flatten(params)
    assert all(new[key] is old[key] for key in old)  # no copies either


@pytest.mark.parametrize("to_array", [np.asarray, jnp.asarray])
def test_only_what_changes_is_copied_and_nothing_in_place(tiny, to_array, assert_same):
    params = jax.tree.map(to_array, tiny.tree())
    shapes = tiny.sizes_with(num_tokens=36).shapes()
    adapted = layout.flatten(adapt(params, shapes, (6, 6), "interpolate"))
    old = layout.flatten(params)
    for key, array in adapted.items():
        assert array.dtype == np.float32
        changed = shapes[key] != tiny.sizes.shapes()[key]
        assert (array is not old[key]) == changed
    assert_same(params, tiny.tree())


def stem(params, images):
    """The tokens [batch, down, across, channels] that the stem makes."""
    kernel, bias = params["stem"]["kernel"], params["stem"]["bias"]
    size = kernel.shape[:2]
    patches = rearrange(
        images, "n (h p) (w q) c -> n h w (p q c)", p=size[0], q=size[1]
    )
    return patches @ kernel.reshape(-1, kernel.shape[-1]) + bias


def hidden_activations(params, images):
    """What the first block's token mixing has behind its GELU."""
    x = rearrange(stem(params, images), "n h w c -> n c (h w)")
    mean, var = x.mean(1, keepdims=True), x.var(1, keepdims=True)
    norm = params["MixerBlock_0"]["LayerNorm_0"]
    x = (x - mean) / np.sqrt(var + 1e-6)
    x = x * norm["scale"].reshape(1, -1, 1) + norm["bias"].reshape(1, -1, 1)
    dense = params["MixerBlock_0"]["token_mixing"]["Dense_0"]
    return np.asarray(
        jax.nn.gelu(x @ dense["kernel"] + dense["bias"].reshape(1, 1, -1))
    )


P16 = MlpMixer(Patches((16, 16)), 5, 2, 8, 64, 16)
SIZES = [(160, 160), (288, 288), (320, 224), (448, 448), (64, 48), (112, 448)]


def interpolated(params, image_size, model=P16):
    new_grid = (image_size[0] // 16, image_size[1] // 16)
    return adapt(params, shapes_for(model, image_size), new_grid, "interpolate")


@pytest.mark.parametrize("image_size", SIZES)
def test_interpolate_keeps_the_hidden_units_of_a_constant_image(image_size):
    params = random_params(P16, (224, 224))
    adapted = interpolated(params, image_size)
    colour = np.array([0.3, -0.7, 0.5], "float32")
    old, new = (
        hidden_activations(tree, np.broadcast_to(colour, (1, *size, 3)))
        for tree, size in ((params, (224, 224)), (adapted, image_size))
    )
    assert np.ptp(old) > 0.1
    np.testing.assert_allclose(new, old, rtol=0, atol=1e-5)


@pytest.mark.parametrize("image_size", SIZES[2:5])
def test_interpolate_is_a_bilinear_resize_of_the_grid(image_size):
    """Of what hidden units write; they read tokens resized to the old grid."""
    params = random_params(P16, (224, 224))
    adapted = interpolated(params, image_size)
    h, w = image_size[0] // 16, image_size[1] // 16
    old, new = (tree["MixerBlock_1"]["token_mixing"] for tree in (params, adapted))
    for name, lead in (("kernel", 64), ("bias", 1)):
        grids = old["Dense_1"][name].reshape(lead, 14, 14)
        expected = jax.image.resize(grids, (lead, h, w), "bilinear")
        np.testing.assert_allclose(
            new["Dense_1"][name].reshape(lead, h, w), expected, rtol=0, atol=1e-6
        )
    tokens = np.random.default_rng(0).standard_normal((3, h, w), "float32")
    resized = jax.image.resize(tokens, (3, 14, 14), "bilinear")
    np.testing.assert_allclose(
        rearrange(tokens, "n h w -> n (h w)") @ new["Dense_0"]["kernel"],
        rearrange(np.asarray(resized), "n h w -> n (h w)") @ old["Dense_0"]["kernel"],
        rtol=0,
        atol=1e-5,
    )
    np.testing.assert_array_equal(new["Dense_0"]["bias"], old["Dense_0"]["bias"])


def smooth_images(image_size, n=3):
    """The same pictures, of a few slow waves, at any size."""
    rng = np.random.default_rng(2)
    y, x = (
        ((np.arange(side) + 0.5) / side).reshape(shape)
        for side, shape in zip(image_size, ((-1, 1), (1, -1)), strict=True)
    )
    images = np.zeros((n, *image_size, 3))
    for image in images:
        for channel in range(3):
            a, b, phase = rng.uniform(-3, 3, 3)
            image[..., channel] = 0.8 * np.sin(a * y + b * x + phase)
    return images.astype("float32")


def smooth_kernels(params):
    """The same parameters, with token mixing by slow waves over the grid."""
    rng = np.random.default_rng(3)
    y, x = np.meshgrid((np.arange(14) + 0.5) / 14, (np.arange(14) + 0.5) / 14)
    waves = np.stack(
        [
            np.cos(np.pi * a * y) * np.cos(np.pi * b * x)
            for a in range(4)
            for b in range(4)
        ]
    )
    waves = rearrange(waves, "k h w -> k (h w)")
    params = jax.tree.map(np.copy, params)
    for i in range(2):
        mixing = params[f"MixerBlock_{i}"]["token_mixing"]
        weights = rng.standard_normal((2, 64, 16))
        mixing["Dense_0"]["kernel"] = (weights[0] @ waves).T.astype("float32") / 40
        mixing["Dense_1"]["kernel"] = (weights[1] @ waves).astype("float32") / 10
        mixing["Dense_1"]["bias"] = (weights[1, 0] @ waves).astype("float32") / 10
    return params


@pytest.mark.parametrize("image_size", [(160, 160), (288, 288), (320, 224)])
def test_interpolate_keeps_the_logits_of_smooth_images(image_size):
    """About: the units read and write slow waves, and the patches are others."""
    params = smooth_kernels(random_params(P16, (224, 224)))
    adapted = interpolated(params, image_size)
    old = run(P16, params, smooth_images((224, 224)))[0]
    new = run(P16, adapted, smooth_images(image_size))[0]
    assert np.abs(new - old).max() < 0.2 * old.std()


def test_there_and_back_keeps_smooth_kernels():
    """About: each resize smooths a little, the most at the border."""
    params = smooth_kernels(random_params(P16, (224, 224)))
    there = interpolated(params, (448, 448))
    back = interpolated(there, (224, 224))
    old, new = layout.flatten(params), layout.flatten(back)
    for key, array in old.items():
        error = np.linalg.norm(new[key] - array) / np.linalg.norm(array)
        assert error < 0.1


@pytest.mark.parametrize(
    ("old", "new"), [((8, 8), (16, 16)), ((8, 8), (13, 11)), ((4, 6), (8, 12))]
)
def test_an_enlarged_patch_gives_the_token_that_it_gave(old, new):
    """FlexiViT, section 3.4. Each patch is enlarged by itself."""
    model = MODEL.clone(patches=Patches(old))
    images = draw_images((4 * old[0], 4 * old[1]))
    params = random_params(model, images.shape[1:3])
    patches = rearrange(images, "n (h p) (w q) c -> n h w p q c", h=4, w=4)
    enlarged = np.zeros((2, 4, 4, *new, 3), "float32")
    for index in np.ndindex(2, 4, 4):
        enlarged[index] = resample(patches[index], new, "bilinear")
    enlarged = rearrange(enlarged, "n h w p q c -> n (h p) (w q) c")
    larger = MODEL.clone(patches=Patches(new))
    shapes = shapes_for(larger, enlarged.shape[1:3])
    adapted = adapt(params, shapes, (4, 4), "interpolate")
    old_tokens, new_tokens = stem(params, images), stem(adapted, enlarged)
    assert new_tokens.shape == old_tokens.shape == (2, 4, 4, 12)
    np.testing.assert_allclose(new_tokens, old_tokens, rtol=0, atol=1e-4)


@pytest.mark.parametrize("new", [(4, 4), (16, 16), (8, 12)])
def test_the_stem_is_the_pseudo_inverse_of_a_resize(new):
    """As a matrix for whole patches, made with OpenCV."""
    kernel = np.random.default_rng(0).standard_normal((8, 8, 3, 5), "float32")
    shape = {"stem/kernel": (*new, 3, 5)}
    adapted = adapt({"stem": {"kernel": kernel}}, shape, (4, 4), "interpolate")
    patches = np.eye(64, dtype="float32").reshape(64, 8, 8)
    matrix = np.stack([cv2.resize(x, new[::-1]).ravel() for x in patches], 1)
    assert matrix.shape == (math.prod(new), 64)
    expected = np.linalg.pinv(matrix.T.astype("float64")) @ kernel.reshape(64, -1)
    found = adapted["stem"]["kernel"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(
        found.reshape(len(expected), -1), expected, rtol=0, atol=1e-5
    )


def test_patches_of_half_the_size_are_four_times_the_tokens():
    """A /8 model from a /4 file: the stem, and token mixing for the new grid."""
    model = MODEL.clone(patches=Patches((2, 2)), tokens_mlp_dim=40)
    params = random_params(MODEL, (16, 16))
    shapes = shapes_for(model, (16, 16))
    adapted = adapt(params, shapes, (8, 8), "block_diagonal")
    assert layout.shapes_of(adapted) == shapes


@pytest.fixture
def gating(tmp_path):
    module = import_gating_fork(tmp_path / "gating")
    return module.MlpMixer(Patches((4, 4)), 5, 2, 12, 0, 20, gate_dim=5)


def test_a_fork_with_another_token_mixing(gating):
    """Its kernel is [tokens, tokens]: no name says so, but its shape does."""
    model, params = gating, random_params(gating, (16, 16))
    key = "MixerBlock_1/spatial_gating/Dense_1"
    images = draw_images((32, 32))
    tiles = rearrange(images, "n (k h) (l w) c -> (n k l) h w c", k=2, l=2)
    shapes = shapes_for(model, (32, 32))
    adapted = adapt(params, shapes, (8, 8), "block_diagonal")
    assert layout.shapes_of(adapted) == shapes
    expected = rearrange(run(model, params, tiles)[1], "(n k) c -> n k c", k=4)
    found = run(model, adapted, images)[1]
    np.testing.assert_allclose(found, expected.mean(axis=1), rtol=0, atol=1e-5)

    shapes = shapes_for(model, (20, 24))
    adapted = layout.flatten(adapt(params, shapes, (5, 6), "interpolate"))
    assert adapted[f"{key}/kernel"].shape == (30, 30)
    old = layout.flatten(params)[f"{key}/kernel"].sum(axis=0).reshape(4, 4)
    np.testing.assert_allclose(  # what all tokens together give
        adapted[f"{key}/kernel"].sum(axis=0).reshape(5, 6),
        jax.image.resize(old, (5, 6), "bilinear"),
        rtol=0,
        atol=1e-5,
    )


def test_parameters_with_an_axis_for_each_token(tiny):
    """Such as position embeddings, and those of all blocks in one array."""
    rng = np.random.default_rng(0)
    position = rng.standard_normal((16, 12), "float32")
    stacked = rng.standard_normal((2, 16, 6), "float32")
    params = tiny.tree() | {"position": position, "blocks": {"kernel": stacked}}
    shapes = tiny.sizes_with(num_tokens=64, tokens_mlp_dim=24).shapes()
    shapes |= {"position": (64, 12), "blocks/kernel": (2, 64, 24)}
    adapted = adapt(params, shapes, (8, 8), "block_diagonal")
    grid = position.reshape(4, 4, 12)
    np.testing.assert_array_equal(
        adapted["position"].reshape(8, 8, 12), np.tile(grid, (2, 2, 1))
    )
    one = {"blocks": {"kernel": stacked[1]}}
    shapes = {"blocks/kernel": (64, 24)}
    np.testing.assert_array_equal(
        adapted["blocks"]["kernel"][1],
        adapt(one, shapes, (8, 8), "block_diagonal")["blocks"]["kernel"],
    )


def test_hidden_units_are_never_taken_for_tokens(tiny):
    """Though the new model has as many of both, or the old one had."""
    sizes = tiny.sizes_with(tokens_mlp_dim=16)
    shapes = tiny.sizes_with(num_tokens=64, tokens_mlp_dim=64).shapes()
    with pytest.raises(CheckpointError, match="tokens_mlp_dim stays") as error:
        adapt(tiny.tree(sizes), shapes, (8, 8), "interpolate")
    assert "0/token_mixing/Dense_0/kernel: found (64, 16), exp" in str(error.value)
    with pytest.raises(CheckpointError, match="from 4x4 patches to 8x8"):
        adapt(tiny.tree(), shapes, (8, 8), "interpolate")
    adapted = adapt(tiny.tree(sizes), shapes, (8, 8), "block_diagonal")
    assert layout.shapes_of(adapted) == shapes


def test_what_cannot_be_adapted_is_named(tiny):
    params = tiny.tree() | {"pool": {"kernel": np.zeros((16, 3), "float32")}}
    shapes = tiny.sizes_with(num_tokens=64, tokens_mlp_dim=24).shapes()
    shapes["pool/kernel"] = (64, 3)  # the mean over tiles, or their sum?
    with pytest.raises(CheckpointError, match="block_diagonal from 4x4") as error:
        adapt(params, shapes, (8, 8), "block_diagonal", where="a.npz")
    assert str(error.value).splitlines()[1:] == [
        "  pool/kernel: found (16, 3), expected (64, 3)"
    ]

    params = tiny.tree()
    params["stem"]["kernel"] = np.zeros((48, 12), "float32")  # a Dense layer
    shapes = tiny.sizes_with(num_tokens=64, tokens_mlp_dim=24).shapes()
    with pytest.raises(CheckpointError, match=r"stem/kernel: found \(48, 12\), expect"):
        adapt(params, shapes, (8, 8), "block_diagonal")

    params = tiny.tree()
    shapes = tiny.sizes_with(num_tokens=64).shapes()
    message = r"^a\.npz: .* tokens_mlp_dim must be 4 times the old one"
    with pytest.raises(CheckpointError, match=message) as error:
        adapt(params, shapes, (8, 8), "block_diagonal", where="a.npz")
    assert "Dense_0/kernel: found (64, 24), expected (64, 6)" in str(error.value)
    shapes = tiny.sizes_with(num_tokens=36, hidden_dim=13).shapes()
    with pytest.raises(
        CheckpointError, match=r"stem/bias: found \(12,\), expected \(13,"
    ):
        adapt(params, shapes, (6, 6), "interpolate")


def test_sizes_that_make_no_sense_are_named(tiny, assert_same):
    params, shapes = tiny.tree(), tiny.sizes_with(num_tokens=36).shapes()
    with pytest.raises(
        CheckpointError, match="no block_diagonal from 4x4 patches to 6"
    ):
        adapt(params, shapes, (6, 6), "block_diagonal")
    with pytest.raises(CheckpointError, match="for 16 tokens, but grid is"):
        adapt(params, shapes, (6, 6), "interpolate", grid=(4, 5))
    with pytest.raises(ValueError, match="resolution is 'error', expected block_diag"):
        adapt(params, shapes, (6, 6), "error")
    sizes = dataclasses.replace(tiny.sizes, num_tokens=15)
    params = tiny.tree(sizes)
    with pytest.raises(CheckpointError, match="15 tokens, which are no square grid"):
        adapt(params, shapes, (6, 6), "interpolate")
    assert_same(adapt(params, sizes.shapes(), (3, 5), "interpolate"), params)
    adapted = adapt(params, shapes, (6, 6), "interpolate", grid=(3, 5))
    assert layout.shapes_of(adapted) == shapes


def test_a_head_and_parameters_that_the_model_lacks_stay(tiny, assert_same):
    params = tiny.tree() | {"gate": {"kernel": np.ones((16, 3), "float32")}}
    shapes = tiny.sizes_with(num_tokens=36, num_classes=7).shapes()
    adapted = adapt(params, shapes, (6, 6), "interpolate")
    for name in ("head", "gate"):
        assert_same(adapted[name], params[name])


@pytest.mark.parametrize(
    ("resolution", "changes"),
    [
        ("block_diagonal", {"num_tokens": 64, "tokens_mlp_dim": 24}),
        ("interpolate", {"num_tokens": 25}),
        ("interpolate", {"num_tokens": 64, "patches": Patches((2, 2))}),
        ("interpolate", {"patches": Patches((8, 8))}),
        ("block_diagonal", {}),
    ],
)
def test_load_pretrained_adapts_the_file(
    tiny, tmp_path, caplog, assert_same, resolution, changes
):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    sizes = tiny.sizes_with(num_classes=3, **changes)
    init = tiny.tree(sizes, seed=1)
    with caplog.at_level("INFO", logger="mixer_jax"):
        params = mixer_jax.load_pretrained(tmp_path / "a.npz", init, resolution)
    assert layout.shapes_of(params) == sizes.shapes()
    assert params["head"]["kernel"] is init["head"]["kernel"]
    side = math.isqrt(sizes.num_tokens)
    adapted = adapt(tiny.tree(), sizes.shapes(), (side, side), resolution)
    assert_same(params | {"head": {}}, adapted | {"head": {}})
    by = f"a.npz by {resolution} from 4x4 patches to {side}x{side}"
    assert (by in caplog.text) == ("num_tokens" in changes)
    assert ("its stem from (4, 4, 3, 12)" in caplog.text) == ("patches" in changes)


def test_load_pretrained_for_images_that_are_not_square(tiny, tmp_path, assert_same):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    sizes = tiny.sizes_with(num_tokens=35)
    arguments = (tmp_path / "a.npz", tiny.tree(sizes), "interpolate")
    with pytest.raises(CheckpointError, match=r"no square grid .* give the grid"):
        mixer_jax.load_pretrained(*arguments)
    params = mixer_jax.load_pretrained(*arguments, grid=(7, 5))
    adapted = adapt(tiny.tree(), sizes.shapes(), (7, 5), "interpolate")
    assert_same(params | {"head": {}}, adapted | {"head": {}})


def test_load_pretrained_at_another_size_into_a_fork(
    gating, tiny, tmp_path, assert_same
):
    """One has a parameter of its own, the other a token mixing of its own."""
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    init = tiny.tree(tiny.sizes_with(num_tokens=36))
    gamma = np.ones(16, "float32")  # as many as the file has tokens
    init["MixerBlock_1"]["gamma"] = gamma
    params = mixer_jax.load_pretrained(tmp_path / "a.npz", init, "interpolate")
    assert params["MixerBlock_1"].pop("gamma") is gamma
    adapted = adapt(tiny.tree(), layout.shapes_of(params), (6, 6), "interpolate")
    assert_same(params | {"head": {}}, adapted | {"head": {}})

    init = random_params(gating, (24, 24))
    arguments = (tmp_path / "a.npz", init, "interpolate")
    with pytest.raises(CheckpointError, match="init_params without a grid: no"):
        mixer_jax.load_pretrained(*arguments)
    params = mixer_jax.load_pretrained(*arguments, grid=(6, 6))
    name = "spatial_gating"
    assert_same(params["MixerBlock_0"][name], init["MixerBlock_0"][name])
    assert_same(params["stem"], tiny.tree()["stem"])


def test_load_pretrained_of_another_size_names_the_choices_and_their_costs(
    tiny, tmp_path
):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    init = tiny.tree(tiny.sizes_with(num_tokens=64))
    with pytest.raises(CheckpointError) as error:
        mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    for text in (
        r"'interpolate': .*\n.* tokens_mlp_dim=6\. Token mixing has 4 times the para",
        r"'block_diagonal': .*\n.* tokens_mlp_dim=24\. Token mixing has 16 times the ",
    ):
        assert re.search(text, str(error.value))
    init = tiny.tree(tiny.sizes_with(num_tokens=36))
    with pytest.raises(CheckpointError, match=r"each tile\. Not possible here"):
        mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    init = tiny.tree(tiny.sizes_with(patches=Patches((8, 8))))
    with pytest.raises(CheckpointError, match="resolution='interpolate'"):
        mixer_jax.load_pretrained(tmp_path / "a.npz", init)
    with pytest.raises(ValueError, match="'bilinear', expected one of error, block"):
        mixer_jax.load_pretrained(tmp_path / "a.npz", init, "bilinear")
