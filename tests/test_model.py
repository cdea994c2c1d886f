import functools
import re

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import mixer_jax
from mixer_jax.blocks import REMAT_POLICIES
from mixer_jax.model import MixerBlock, MlpBlock, MlpMixer
from mixer_jax.variants import VARIANTS, Patches

# Parameters at 224 px without a head and, where vit_jax asserts it, with 1000 classes.
PARAMETERS = {
    "S/32": (18_591_624, None),
    "S/16": (18_015_264, None),
    "S/8": (20_133_504, None),  # from the published file's size in bytes
    "B/32": (59_524_428, 60_293_428),
    "B/16": (59_111_472, 59_880_472),
    "L/32": (205_914_264, None),
    "L/16": (207_171_168, 208_196_168),
    "H/14": (431_069_952, None),
}
TINY = {
    "patches": Patches((4, 4)),
    "num_blocks": 3,
    "hidden_dim": 24,
    "tokens_mlp_dim": 10,
    "channels_mlp_dim": 40,
}


def count_parameters(name: str, num_classes: int) -> int:
    model = mixer_jax.create_model(name, num_classes=num_classes)
    images = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    init = lambda x: model.init(jax.random.key(0), x, train=False)
    return sum(x.size for x in jax.tree.leaves(jax.eval_shape(init, images)["params"]))


def init(model: MlpMixer, images: jax.Array) -> dict:
    """Compiled as one program: each operation alone would be compiled too."""
    run = jax.jit(lambda x: model.init(jax.random.key(0), x, train=False))
    return run(images)


def apply(model: MlpMixer, variables: dict, images: jax.Array, **kwargs):
    """What the model computes in an evaluation, compiled as one program."""
    return jax.jit(lambda v, x: model.apply(v, x, train=False, **kwargs))(
        variables, images
    )


def init_random(model: MlpMixer, image_shape: tuple[int, ...]) -> dict:
    """Parameters that are all random, the head and the biases too."""
    params = init(model, jnp.zeros((1, *image_shape)))
    leaves, treedef = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(
        treedef, [x + 0.1 * rng.standard_normal(x.shape, "float32") for x in leaves]
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_parameter_counts(name):
    without_head, with_head = PARAMETERS[name]
    assert count_parameters(name, 0) == without_head
    if with_head:
        assert count_parameters(name, 1000) == with_head


def test_forward_and_gradients_equal_the_original(golden):
    data = golden.load("forward.npz")
    params = golden.tree(data, "params/")
    model = MlpMixer(num_classes=7, **TINY)

    def loss_fn(params):
        logits, state = model.apply(
            {"params": params}, data["images"], train=True, mutable=["intermediates"]
        )
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, data["labels"])
        return loss.mean(), (logits, state["intermediates"]["pre_logits"][0])

    (loss, (logits, pre_logits)), grads = jax.jit(
        jax.value_and_grad(loss_fn, has_aux=True)
    )(params)
    np.testing.assert_allclose(loss, data["loss"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(logits, data["logits"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(pre_logits, data["pre_logits"], atol=1e-5, rtol=0)
    expected = golden.tree(data, "grads/")
    assert jax.tree.structure(grads) == jax.tree.structure(expected)
    jax.tree.map(
        lambda found, want: np.testing.assert_allclose(found, want, atol=1e-5, rtol=0),
        grads,
        expected,
    )


@pytest.mark.parametrize("num_classes", [0, None])
def test_without_head_returns_pre_logits(golden, num_classes):
    data = golden.load("forward.npz")
    params = golden.tree(data, "params/")
    del params["head"]
    model = MlpMixer(num_classes=num_classes, **TINY)
    pre_logits = apply(model, {"params": params}, data["images"])
    np.testing.assert_allclose(pre_logits, data["pre_logits"], atol=1e-5, rtol=0)


def test_mixer_is_a_cnn():
    """Channel mixing is 1x1 convolutions; token mixing, full-size depth-wise ones."""
    model = MlpMixer(num_classes=5, **TINY)
    variables = init_random(model, (16, 16, 3))
    p = variables["params"]
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    norm = lambda x, q: nn.LayerNorm().apply({"params": q}, x)
    vector = lambda x: x.reshape(1, 1, 1, -1)

    def conv(x, kernel, groups=1, strides=(1, 1)):
        return lax.conv_general_dilated(
            x,
            kernel,
            strides,
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=groups,
        )

    def mix_tokens(x, q):
        n, h, w, c = x.shape
        # One filter of the whole grid per hidden unit, the same for every channel:
        # output [n, 1, 1, c * hidden].
        shared = q["Dense_0"]["kernel"].reshape(h, w, 1, -1)
        hidden = conv(x, jnp.tile(shared, (1, 1, 1, c)), groups=c)
        hidden = nn.gelu(hidden.reshape(n, 1, c, -1) + vector(q["Dense_0"]["bias"]))
        # Back to the grid by a 1x1 convolution over hidden units.
        kernel = q["Dense_1"]["kernel"][None, None]
        y = conv(hidden, kernel) + vector(q["Dense_1"]["bias"])
        return y.reshape(n, c, h, w).transpose(0, 2, 3, 1)

    def mix_channels(x, q):
        y = conv(x, q["Dense_0"]["kernel"][None, None])
        y = nn.gelu(y + vector(q["Dense_0"]["bias"]))
        y = conv(y, q["Dense_1"]["kernel"][None, None])
        return y + vector(q["Dense_1"]["bias"])

    @jax.jit
    def as_cnn(images):
        x = conv(images, p["stem"]["kernel"], strides=(4, 4))
        x = x + vector(p["stem"]["bias"])
        for i in range(3):
            q = p[f"MixerBlock_{i}"]
            x = x + mix_tokens(norm(x, q["LayerNorm_0"]), q["token_mixing"])
            x = x + mix_channels(norm(x, q["LayerNorm_1"]), q["channel_mixing"])
        x = norm(x, p["pre_head_layer_norm"]).mean((1, 2))
        return x @ p["head"]["kernel"] + p["head"]["bias"][None]

    np.testing.assert_allclose(
        apply(model, variables, images), as_cnn(images), atol=1e-5, rtol=0
    )


def test_non_square_images_and_patches_any_channel_count():
    model = MlpMixer(num_classes=5, **(TINY | {"patches": Patches((2, 5))}))
    images = jnp.ones((3, 8, 15, 4))
    variables = init(model, images)
    block = variables["params"]["MixerBlock_0"]
    assert block["token_mixing"]["Dense_0"]["kernel"].shape == (4 * 3, 10)
    assert variables["params"]["stem"]["kernel"].shape == (2, 5, 4, 24)
    assert apply(model, variables, images).shape == (3, 5)


def test_tokens_are_the_grid_row_by_row():
    model = MlpMixer(num_classes=None, **(TINY | {"num_blocks": 1}))
    images = jax.random.normal(jax.random.key(0), (1, 8, 12, 3))
    variables = init(model, images)
    filter_ = lambda module, _: module.name == "stem"
    _, state = apply(model, variables, images, capture_intermediates=filter_)
    grid = state["intermediates"]["stem"]["__call__"][0]
    block = MixerBlock(10, 40)
    tokens = jnp.stack([grid[:, h, w] for h in range(2) for w in range(3)], axis=1)

    @jax.jit
    def from_tokens(p, tokens):
        out = block.apply({"params": p["MixerBlock_0"]}, tokens)
        return nn.LayerNorm().apply({"params": p["pre_head_layer_norm"]}, out).mean(1)

    np.testing.assert_allclose(
        apply(model, variables, images),
        from_tokens(variables["params"], tokens),
        atol=1e-6,
    )


def test_image_that_patches_do_not_divide():
    model = MlpMixer(num_classes=5, **TINY)
    with pytest.raises(ValueError, match=re.escape("18x16 pixels")) as error:
        model.init(jax.random.key(0), jnp.zeros((1, 18, 16, 3)), train=False)
    assert "4x4" in str(error.value)


def test_parameters_for_another_number_of_tokens():
    model = MlpMixer(num_classes=5, **TINY)
    variables = init(model, jnp.zeros((1, 16, 16, 3)))
    with pytest.raises(flax.errors.ScopeParamShapeError) as error:
        apply(model, variables, jnp.zeros((1, 16, 20, 3)))
    message = str(error.value)
    assert "/MixerBlock_0/token_mixing/Dense_0" in message
    assert "(20, 10)" in message
    assert "(16, 10)" in message


def test_second_bias_of_token_mixing_changes_nothing(golden):
    """It shifts all channels of a token alike, which every LayerNorm takes away."""
    data = golden.load("forward.npz")
    params = golden.tree(data, "params/")
    for i in range(3):
        bias = params[f"MixerBlock_{i}"]["token_mixing"]["Dense_1"]["bias"]
        bias += np.arange(len(bias), dtype=np.float32)
    model = MlpMixer(num_classes=7, **TINY)
    logits = apply(model, {"params": params}, data["images"])
    np.testing.assert_allclose(logits, data["logits"], atol=1e-4, rtol=0)


def test_head_kernel_starts_at_zero():
    model = MlpMixer(num_classes=5, **TINY)
    variables = init(model, jnp.zeros((1, 16, 16, 3)))
    assert not variables["params"]["head"]["kernel"].any()


def test_stochastic_depth_drops_whole_branches_without_rescaling():
    x = jax.random.normal(jax.random.key(0), (2, 4, 6))
    block = MixerBlock(5, 7)
    params = jax.jit(block.init)(jax.random.key(1), x)["params"]
    silent = lambda branch: (
        params | {branch: jax.tree.map(np.zeros_like, params[branch])}
    )
    run = jax.jit(lambda params, keep: block.apply({"params": params}, x, keep))
    for i, other in ((0, "channel_mixing"), (1, "token_mixing")):
        keep = np.zeros((2, 2, 1, 1), np.float32)
        keep[i, 0] = 1  # one example keeps one branch
        out = run(params, keep)
        whole = run(silent(other), np.ones_like(keep))
        np.testing.assert_allclose(out[0], whole[0], atol=1e-6)
        np.testing.assert_array_equal(out[1], x[1])


def drawn_stochastic_depth(model, batch):
    """What each block was told to keep, [num_blocks, 2, batch]."""
    images = jnp.zeros((batch, 4, 4, 3))
    variables = init(model, images)
    seen = []

    def record(next_fun, args, kwargs, context):
        if isinstance(context.module, MixerBlock) and context.method_name == "__call__":
            seen.append(args[1])
        return next_fun(*args, **kwargs)

    @jax.jit
    def draw(variables, images, rng):
        with nn.intercept_methods(record):
            model.apply(variables, images, train=True, rngs={"dropout": rng})
        return jnp.stack(seen)

    return np.asarray(draw(variables, images, jax.random.key(1)))[..., 0, 0]


def test_stochastic_depth_rises_linearly_and_draws_for_each_branch_and_example():
    model = MlpMixer(num_classes=5, stoch_depth=0.4, **(TINY | {"num_blocks": 5}))
    keep = drawn_stochastic_depth(model, 4000)
    assert set(np.unique(keep)) == {0, 1}
    # Binomial with n = 4000: four standard deviations are 0.031.
    want = np.broadcast_to(1 - np.array([0, 0.1, 0.2, 0.3, 0.4])[:, None], (5, 2))
    np.testing.assert_allclose(keep.mean(-1), want, atol=0.031)
    both = (keep[:, 0] * keep[:, 1]).mean(-1)
    np.testing.assert_allclose(both, want[:, 0] ** 2, atol=0.031)
    one = MlpMixer(num_classes=5, stoch_depth=0.4, **(TINY | {"num_blocks": 1}))
    assert drawn_stochastic_depth(one, 50).all()


@pytest.fixture(scope="module")
def logits_and_gradients(golden):
    data = golden.load("forward.npz")

    def compute(**fields):
        model = MlpMixer(num_classes=7, stoch_depth=0.5, **TINY, **fields)

        def loss_fn(params):
            logits = model.apply(
                {"params": params},
                data["images"],
                train=True,
                rngs={"dropout": jax.random.key(3)},
            )
            return optax.softmax_cross_entropy_with_integer_labels(
                logits, data["labels"]
            ).mean(), logits

        params = golden.tree(data, "params/")
        grads, logits = jax.jit(jax.grad(loss_fn, has_aux=True))(params)
        return logits, grads

    return compute


@pytest.fixture(scope="module")
def unrolled(logits_and_gradients):
    return logits_and_gradients()


@pytest.mark.parametrize("scan_blocks", [False, True])
@pytest.mark.parametrize("remat", REMAT_POLICIES)
def test_remat_and_scan_change_no_value(
    golden, logits_and_gradients, unrolled, remat, scan_blocks
):
    logits = golden.load("forward.npz")["logits"]
    assert not np.allclose(unrolled[0], logits, atol=1e-3)  # branches are lost
    found = logits_and_gradients(remat=remat, scan_blocks=scan_blocks)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6, rtol=0),
        found,
        unrolled,
    )


@pytest.mark.slow
def test_remat_saves_memory_in_the_order_of_what_it_computes_again():
    def temporary_bytes(remat):
        # Unrolled, XLA for CPU finds the recomputation and removes it; TPU's does not.
        model = MlpMixer(num_classes=5, remat=remat, scan_blocks=True, **TINY)
        images = jnp.zeros((256, 16, 16, 3))
        variables = jax.eval_shape(
            lambda: model.init(jax.random.key(0), images, train=False)
        )
        loss_fn = lambda v: model.apply(v, images, train=True).sum()
        compiled = jax.jit(jax.grad(loss_fn)).lower(variables).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    none, dots, blocks = (temporary_bytes(x) for x in ("none", "dots", "blocks"))
    assert blocks < 0.95 * dots
    assert dots < 0.5 * none


def test_scanned_blocks_take_dropout_and_keep_the_published_tree():
    images = jnp.ones((2, 8, 8, 3))
    plain = MlpMixer(num_classes=None, dropout_rate=0.5, **TINY)
    scanned = plain.copy(scan_blocks=True)
    variables = init(plain, images)
    jax.tree.map(np.testing.assert_array_equal, init(scanned, images), variables)

    @jax.jit
    def run(key):
        rngs = {"dropout": jax.random.key(key)}
        return scanned.apply(variables, images, train=True, rngs=rngs)

    first, again, other = (np.asarray(run(key)) for key in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()
    assert (first[0] != first[1]).any()  # of equal images


def test_every_layer_norm_has_the_epsilon_of_the_field():
    model = MlpMixer(num_classes=5, layer_norm_epsilon=0.25, **TINY)
    seen = {}

    def watch(call, args, kwargs, context):
        if isinstance(context.module, nn.LayerNorm):
            seen["/".join(context.module.path)] = context.module.epsilon
        return call(*args, **kwargs)

    with nn.intercept_methods(watch):
        variables = init_random(model, (8, 8, 3))
    assert len(seen) == 2 * 3 + 1
    assert set(seen.values()) == {0.25}
    images = jax.random.normal(jax.random.key(1), (2, 8, 8, 3))
    found = apply(model, variables, images)
    other = apply(model.clone(layer_norm_epsilon=1e-6), variables, images)
    assert abs(np.subtract(found, other)).max() > 1e-3


def test_unknown_remat():
    model = MlpMixer(num_classes=5, remat="everything", **TINY)
    with pytest.raises(ValueError, match=r"'everything', expected one of none, blocks"):
        model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 3)), train=False)


def test_dropout_follows_gelu_and_second_dense():
    x = jnp.ones((200, 8))
    mlp = MlpBlock(64, dropout_rate=0.5)
    params = jax.jit(mlp.init)(jax.random.key(0), x)["params"]

    @functools.partial(jax.jit, static_argnums=0)
    def run(train):
        rngs = {"dropout": jax.random.key(1)}
        return mlp.apply({"params": params}, x, train=train, rngs=rngs)

    dropped = np.asarray(run(True))
    assert abs((dropped == 0).mean() - 0.5) < 0.05  # after the second Dense
    survivors = dropped[:, 0][dropped[:, 0] != 0]
    assert len(np.unique(survivors)) > 50  # hidden units were dropped too
    assert not (np.asarray(run(False)) == 0).any()


def test_evaluation_needs_no_rng_and_ignores_dropout(golden):
    data = golden.load("forward.npz")
    params = golden.tree(data, "params/")
    model = MlpMixer(num_classes=7, dropout_rate=0.5, stoch_depth=0.5, **TINY)
    logits = apply(model, {"params": params}, data["images"])
    np.testing.assert_allclose(logits, data["logits"], atol=1e-5, rtol=0)


def test_bfloat16_activations_keep_float32_parameters_and_logits(golden):
    data = golden.load("forward.npz")
    model = MlpMixer(num_classes=7, dtype="bfloat16", **TINY)
    variables = init(model, data["images"])
    assert {x.dtype for x in jax.tree.leaves(variables)} == {jnp.dtype("float32")}
    variables = {"params": golden.tree(data, "params/")}
    logits, state = apply(model, variables, data["images"], capture_intermediates=True)
    blocks = state["intermediates"]["MixerBlock_2"]["__call__"][0]
    assert blocks.dtype == jnp.bfloat16
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, data["logits"], atol=0.2)


def test_intermediates_are_the_tokens_after_each_block():
    model = MlpMixer(num_classes=5, **TINY)
    variables = init_random(model, (16, 16, 3))
    images = jax.random.normal(jax.random.key(1), (2, 16, 16, 3))
    logits, state = apply(model, variables, images, capture_intermediates=True)
    found = state["intermediates"]
    tokens = [found[f"MixerBlock_{i}"]["__call__"][0] for i in range(3)]
    pre_logits = found["pre_logits"][0]
    assert [x.shape for x in tokens] == [(2, 16, 24)] * 3
    p = variables["params"]
    block = jax.jit(lambda q, x: MixerBlock(10, 40).apply({"params": q}, x))
    for i in (1, 2):
        out = block(p[f"MixerBlock_{i}"], tokens[i - 1])
        np.testing.assert_allclose(tokens[i], out, atol=1e-6)
    norm = jax.jit(lambda q, x: nn.LayerNorm().apply({"params": q}, x).mean(1))
    expected = norm(p["pre_head_layer_norm"], tokens[2])
    np.testing.assert_allclose(pre_logits, expected, atol=1e-6)
    head = pre_logits @ p["head"]["kernel"] + p["head"]["bias"][None]
    np.testing.assert_allclose(logits, head, atol=1e-5)


def test_create_model_takes_both_spellings_and_overrides():
    assert mixer_jax.create_model("B/16", 10).hidden_dim == 768
    model = mixer_jax.create_model("Mixer-L_16", 10, num_blocks=2, stoch_depth=0.1)
    assert (model.hidden_dim, model.num_blocks, model.stoch_depth) == (1024, 2, 0.1)
    with pytest.raises(ValueError, match=r"'B/15'.*B/16"):
        mixer_jax.create_model("B/15")
    with pytest.raises(TypeError, match="stochastic_depth"):
        mixer_jax.create_model("B/16", stochastic_depth=0.1)
