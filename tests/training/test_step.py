import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mixer_jax.model import MlpMixer
from mixer_jax.training import losses, sharding
from mixer_jax.training.optimizer import create_optimizer, create_schedule
from mixer_jax.training.step import (
    TrainState,
    init_state,
    make_eval_step,
    make_feature_step,
    make_train_step,
    predict_classes,
    rank_labels,
    sum_scores,
    to_model_input,
)
from mixer_jax.variants import Patches

MODEL = MlpMixer(
    patches=Patches((4, 4)),
    num_classes=7,
    num_blocks=3,
    hidden_dim=24,
    tokens_mlp_dim=10,
    channels_mlp_dim=40,
)


def mesh_of(data, fsdp=1):
    devices = jax.devices()[: data * fsdp]
    return jax.make_mesh(
        (data, fsdp), ("data", "fsdp"), (AxisType.Auto,) * 2, devices=devices
    )


def run(mesh, tx, schedule, loss_fn, params, batches, **kwargs):
    """Trains over `batches` and returns the metrics by step and the parameters."""
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    where = sharding.state_shardings(mesh, state)
    state = jax.device_put(state, where)
    step = jax.jit(
        make_train_step(MODEL, tx, schedule, loss_fn, **kwargs),
        in_shardings=(where, sharding.batch_sharding(mesh), sharding.replicated(mesh)),
        out_shardings=(where, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    rows = []
    with jax.set_mesh(mesh):
        for images, labels in batches:
            dtype = np.int32 if labels.ndim == 1 else np.float32
            batch = {"image": images, "label": labels.astype(dtype)}
            state, metrics = step(
                state, sharding.shard_batch(mesh, batch), jax.random.key(0)
            )
            rows.append(jax.device_get(metrics))
    assert int(state.step) == len(rows)
    return {key: np.array([row[key] for row in rows]) for key in rows[0]}, state.params


def assert_trees_close(found, expected, atol):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=atol, rtol=0),
        found,
        expected,
    )


@pytest.mark.parametrize("devices", [1, 4])
def test_fine_tuning_equals_the_original(golden, devices):
    data = golden.load("finetune.npz")
    schedule = create_schedule(
        str(data["decay_type"]),
        float(data["base_lr"]),
        int(data["total_steps"]),
        int(data["warmup_steps"]),
    )
    tx = create_optimizer("sgd", schedule, grad_norm_clip=float(data["grad_norm_clip"]))
    metrics, params = run(
        mesh_of(devices),
        tx,
        schedule,
        losses.softmax_cross_entropy,
        golden.tree(data, "init/"),
        zip(data["images"], data["labels"], strict=True),
        accum_steps=int(data["accum_steps"]),
    )
    np.testing.assert_allclose(metrics["loss"], data["loss"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(
        metrics["learning_rate"], data["learning_rate"], atol=1e-7, rtol=0
    )
    assert_trees_close(params, golden.tree(data, "final/"), atol=1e-4)


@pytest.mark.parametrize("devices", [1, 4])
def test_pre_training_equals_the_original(golden, devices):
    data = golden.load("pretrain.npz")
    base_lr = float(data["base_lr"])
    schedule = create_schedule(
        "linear",
        base_lr,
        int(data["total_steps"]),
        int(data["warmup_steps"]),
        linear_end=float(data["linear_end"]) * base_lr,
    )
    tx = create_optimizer(
        "adam",
        schedule,
        grad_norm_clip=float(data["grad_norm_clip"]),
        optim_dtype="float32",
        weight_decay=float(data["weight_decay"]) / base_lr,
    )
    metrics, params = run(
        mesh_of(devices),
        tx,
        schedule,
        losses.sigmoid_cross_entropy,
        golden.tree(data, "init/"),
        zip(data["images"], data["labels"], strict=True),
    )
    np.testing.assert_allclose(metrics["loss"], data["loss"], atol=1e-4, rtol=0)
    np.testing.assert_allclose(metrics["grad_norm"], data["grad_norm"], atol=1e-3)
    np.testing.assert_allclose(
        metrics["learning_rate"] / base_lr, data["schedule"], atol=1e-6
    )
    expected = golden.tree(data, "final/")
    for tree in (params, expected):
        for i in range(MODEL.num_blocks):
            # Nothing depends on it (tests/test_model.py), so its gradient is rounding
            # noise, which Adam blows up to the size of the learning rate.
            del tree[f"MixerBlock_{i}"]["token_mixing"]["Dense_1"]["bias"]
    assert_trees_close(params, expected, atol=1e-4)


@pytest.mark.parametrize("accum_steps", [2, 4])
def test_accumulation_changes_nothing(golden, accum_steps):
    data = golden.load("finetune.npz")
    schedule = create_schedule("constant", 0.03, 1, 0)
    tx = create_optimizer("sgd", schedule, grad_norm_clip=None)
    params = golden.tree(data, "init/")
    batches = [(data["images"][0], data["labels"][0])]
    args = (mesh_of(2), tx, schedule, losses.softmax_cross_entropy, params, batches)
    whole, expected = run(*args)
    sliced, found = run(*args, accum_steps=accum_steps)
    assert_trees_close(found, expected, atol=1e-6)
    np.testing.assert_allclose(sliced["loss"], whole["loss"], atol=1e-6)
    np.testing.assert_allclose(sliced["grad_norm"], whole["grad_norm"], rtol=1e-5)


def test_uint8_images_are_scaled_on_the_device(golden):
    params = golden.tree(golden.load("finetune.npz"), "init/")
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    batch = {"label": np.arange(8) % 7, "mask": np.ones(8, np.float32)}
    evaluate = jax.jit(make_eval_step(MODEL, losses.softmax_cross_entropy))
    sent = evaluate(params, batch | {"image": images})
    exact = evaluate(params, batch | {"image": (images.astype("f4") - 127.5) / 127.5})
    np.testing.assert_allclose(sent["loss"], exact["loss"], rtol=1e-6)


def test_default_scaling_is_the_originals_to_the_bit():
    images = np.arange(256, dtype=np.uint8).reshape(1, -1, 1, 1).repeat(3, -1)
    original = jax.jit(lambda x: (x.astype(jnp.float32) - 127.5) / 127.5)
    found = jax.jit(to_model_input)(images)
    np.testing.assert_array_equal(found, original(images))
    exact = np.float32([[[[0.1, 7.0, -2.0]]]])
    np.testing.assert_array_equal(to_model_input(exact, (0, 0, 0), (9, 9, 9)), exact)


@pytest.mark.parametrize("mixup_p", [0.0, 0.5])
def test_mean_and_standard_deviation_are_applied_on_the_device(golden, mixup_p):
    params = golden.tree(golden.load("finetune.npz"), "init/")
    color = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
    images = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)
    inputs = ((images / 255 - color["mean"]) / color["std"]).astype("f4")
    labels = np.arange(8) % 7
    batch = {"label": labels, "mask": np.ones(8, np.float32)}
    for make in (
        lambda **kwargs: make_eval_step(MODEL, losses.softmax_cross_entropy, **kwargs),
        lambda **kwargs: make_feature_step(MODEL, **kwargs),
    ):
        sent = jax.jit(make(**color))(params, batch | {"image": images})
        want = jax.jit(make())(params, batch | {"image": inputs})
        assert_trees_close(sent, want, atol=1e-4)
    schedule = create_schedule("constant", 1.0, 1, 0)
    tx = create_optimizer("sgd", schedule, grad_norm_clip=None)
    args = (mesh_of(2), tx, schedule, losses.softmax_cross_entropy, params)
    sent, want = (
        run(*args, [(x, labels)], mixup_p=mixup_p, **kwargs)[0]["loss"]
        for x, kwargs in ((images, color), (inputs, {}))
    )
    np.testing.assert_allclose(sent, want, rtol=1e-5)


def test_evaluation_against_numpy_and_without_masked_rows(golden):
    data = golden.load("forward.npz")
    params = golden.tree(data, "params/")
    labels, mask = data["labels"], np.array([1, 1, 0, 1, 0], np.float32)
    evaluate = jax.jit(make_eval_step(MODEL, losses.softmax_cross_entropy))
    sums = evaluate(params, {"image": data["images"], "label": labels, "mask": mask})
    logits = data["logits"].astype(np.float64)
    ranking = np.argsort(-logits, axis=-1)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = {
        "top1": ((ranking[:, 0] == labels) * mask).sum(),
        "top5": ((ranking[:, :5] == labels[:, None]).any(-1) * mask).sum(),
        "loss": (-log_probs[np.arange(5), labels] * mask).sum(),
        "count": 3,
    }
    assert sums.keys() == expected.keys()
    for key in expected:
        np.testing.assert_allclose(sums[key], expected[key], atol=1e-4, err_msg=key)


def test_of_equal_logits_the_first_counts_as_the_highest():
    """As argmax has it: a head that is still zero predicts class 0."""
    images = np.zeros((7, 16, 16, 3), np.float32)
    init = jax.jit(lambda x: MODEL.init(jax.random.key(0), x, train=False)["params"])
    params = init(images)
    evaluate = jax.jit(make_eval_step(MODEL, losses.softmax_cross_entropy))
    several = np.eye(7)[[6, 6, 6, 6, 6, 6, 6]] + np.eye(7)[[0, 1, 2, 3, 4, 5, 6]]
    for labels in (jnp.arange(7), jnp.float32(several > 0)):
        batch = {"image": images, "label": labels, "mask": jnp.ones(7)}
        sums = evaluate(params, batch)
        assert (sums["top1"], sums["top5"]) == (1, 5)


@pytest.mark.parametrize("labels", [jnp.full(2, 6), jnp.ones((2, 7))])
def test_an_image_with_a_nan_among_its_logits_is_never_right(labels):
    logits = jnp.zeros((2, 7)).at[:, 6].set(1).at[1, 3].set(jnp.nan)
    batch = {"label": labels, "mask": jnp.ones(2)}
    sums = sum_scores(logits, batch, losses.softmax_cross_entropy)
    assert (sums["top1"], sums["top5"], sums["count"]) == (1, 1, 2)
    np.testing.assert_array_equal(predict_classes(logits), [6, -1])


def test_labels_are_ranked_as_a_stable_sort_ranks_them():
    """Few levels, so that many logits are equal; and the first is what argmax gives."""
    logits = np.random.default_rng(0).integers(0, 3, (200, 7)).astype(np.float32)
    labels = np.arange(200) % 7
    order = np.argsort(-logits, axis=-1, kind="stable")
    expected = np.argmax(order == labels[:, None], axis=-1)
    rank = rank_labels(jnp.asarray(logits), jnp.asarray(labels))
    np.testing.assert_array_equal(rank, expected)
    first = np.asarray(predict_classes(jnp.asarray(logits))) == labels
    np.testing.assert_array_equal(rank == 0, first)


def test_an_image_without_a_label_is_never_right():
    batch = {"label": jnp.zeros((1, 7)), "mask": jnp.ones(1)}
    sums = sum_scores(jnp.zeros((1, 7)), batch, losses.softmax_cross_entropy)
    assert (sums["top1"], sums["top5"]) == (0, 0)


def one_step(golden, batch=None, **kwargs):
    """The parameters, before and after an update with plain SGD at rate 1."""
    data = golden.load("finetune.npz")
    params = golden.tree(data, "init/")
    schedule = create_schedule("constant", 1.0, 1, 0)
    tx = create_optimizer("sgd", schedule, grad_norm_clip=None, optim_dtype="float32")
    batches = [batch or (data["images"][0], data["labels"][0])]
    loss = losses.softmax_cross_entropy
    metrics, after = run(mesh_of(2), tx, schedule, loss, params, batches, **kwargs)
    return params, after, metrics


def gradient(params, images, labels):
    def mean_loss(params):
        logits = MODEL.apply({"params": params}, images, train=False)
        return losses.softmax_cross_entropy(logits, labels).mean()

    return jax.jit(jax.grad(mean_loss))(params)


def test_sharpness_aware_gradient_is_taken_at_the_worst_neighbour(golden):
    data = golden.load("finetune.npz")
    images, labels = data["images"][0], data["labels"][0]
    before, after, metrics = one_step(golden, sam_rho=0.05, accum_steps=2)
    grads = gradient(before, images, labels)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    worst = jax.tree.map(lambda p, g: p + 0.05 * g / norm, before, grads)
    expected = jax.tree.map(lambda p, g: p - g, before, gradient(worst, images, labels))
    assert_trees_close(after, expected, atol=1e-5)
    _, plain, plain_metrics = one_step(golden)
    np.testing.assert_allclose(metrics["loss"], plain_metrics["loss"], atol=1e-6)
    assert abs(plain["head"]["bias"] - after["head"]["bias"]).max() > 1e-4


def test_label_smoothing_in_the_step(golden):
    data = golden.load("finetune.npz")
    images, labels = data["images"][0], data["labels"][0]
    before, after, _ = one_step(golden, label_smoothing=0.1)
    soft = 0.9 * np.eye(7, dtype=np.float32)[labels] + np.float32(0.1 / 7)
    expected = jax.tree.map(lambda p, g: p - g, before, gradient(before, images, soft))
    assert_trees_close(after, expected, atol=1e-5)


def test_mixup_in_the_step_mixes_images_with_their_labels(golden):
    """Of a batch of one image and one label, mixup leaves nothing changed."""
    data = golden.load("finetune.npz")
    same = (np.repeat(data["images"][0][:1], 8, 0), np.repeat(data["labels"][0][:1], 8))
    _, plain, _ = one_step(golden, batch=same)
    _, mixed, _ = one_step(golden, batch=same, mixup_p=0.5)
    assert_trees_close(mixed, plain, atol=1e-5)
    _, plain, _ = one_step(golden)
    _, mixed, _ = one_step(golden, mixup_p=0.5)
    assert abs(plain["head"]["kernel"] - mixed["head"]["kernel"]).max() > 1e-3


def test_several_labels_any_of_which_is_right(golden):
    data = golden.load("forward.npz")
    order = np.argsort(-data["logits"], axis=-1)
    labels = np.zeros((5, 7), np.float32)
    labels[0, order[0, [0, 6]]] = 1  # the best and the worst: right
    labels[1, order[1, [1, 2]]] = 1  # not the best, but in the first five
    labels[2, order[2, [5, 6]]] = 1  # wrong
    labels[3, order[3, 0]] = 1
    batch = {
        "image": data["images"],
        "label": labels,
        "mask": np.array([1, 1, 1, 1, 0], np.float32),
    }
    evaluate = jax.jit(make_eval_step(MODEL, losses.softmax_cross_entropy))
    sums = evaluate(golden.tree(data, "params/"), batch)
    assert sums["top1"] == 2
    assert sums["top5"] == 3
    assert sums["count"] == 4


def test_head_bias_init_and_features():
    tx = create_optimizer("sgd", create_schedule("constant", 1.0, 1, 0))
    init = lambda rng: init_state(MODEL, tx, rng, (16, 16, 3), head_bias_init=-6.9)
    state = jax.jit(init)(jax.random.key(0))
    np.testing.assert_array_equal(state.params["head"]["bias"], np.float32(-6.9))
    images = jax.random.normal(jax.random.key(1), (4, 16, 16, 3))
    batch = {"image": images, "label": jnp.arange(4)}
    out = jax.jit(make_feature_step(MODEL))(state.params, batch)
    headless = MODEL.clone(num_classes=None)
    apply = jax.jit(lambda p, x: headless.apply({"params": p}, x, train=False))
    expected = apply(state.params, images)
    np.testing.assert_allclose(out["feature"], expected, atol=1e-6)
    assert out.keys() == {"feature", "label"}


def test_all_of_several_labels_are_to_be_found():
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, 7)), jnp.float32)
    labels = jnp.zeros((4, 7)).at[0, 1].set(1).at[0, 4].set(1).at[1].set(1)
    batch = {"label": labels, "mask": jnp.array([1.0, 1, 1, 0])}
    loss_fn = losses.sigmoid_cross_entropy
    sums = sum_scores(logits, batch, loss_fn, multilabel=True)
    expected = loss_fn(logits, labels)[:3].sum()
    np.testing.assert_allclose(sums["loss"], expected, rtol=1e-6)
    assert (sums["count"], sums["labelled"]) == (3, 2)
    assert sums["top1"] == 1 + (jnp.argmax(logits[0]) in (1, 4))


@pytest.mark.parametrize(
    "kwargs", [{}, {"label_smoothing": 0.1, "mixup_p": 0.3, "accum_steps": 2}]
)
def test_rows_of_one_label_train_as_that_label_does(golden, kwargs):
    data = golden.load("finetune.npz")
    images, labels = data["images"][0], data["labels"][0]
    rows = np.eye(7, dtype=np.float32)[labels]
    _, expected, _ = one_step(golden, (images, labels), **kwargs)
    _, found, _ = one_step(golden, (images, rows), **kwargs)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, expected
    )


def test_a_step_that_is_skipped_changes_nothing_but_its_number():
    schedule = create_schedule("cosine", 0.01, 6, 2)
    tx = create_optimizer("adam", schedule, optim_dtype="float32", weight_decay=0.1)
    rng = np.random.default_rng(0)
    batches = [
        (rng.standard_normal((8, 12, 12, 3), "float32"), rng.integers(0, 7, 8))
        for _ in range(5)
    ]
    bad = [(images.copy(), labels) for images, labels in batches]
    bad[1][0][3, 5, 5, 1], bad[2][0][0, 0, 0, 0] = np.nan, np.inf
    params = init_state(MODEL, tx, jax.random.key(0), (12, 12, 3)).params
    params = jax.device_get(params)  # the steps donate theirs
    options = {"skip_nonfinite": True, "sam_rho": 0.05}
    found, expected = (
        run(mesh_of(4, 2), tx, schedule, losses.softmax_cross_entropy, params, each,
            **options)
        for each in (bad, [batches[i] for i in (0, 3, 4)])
    )  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, found[1], expected[1])
    np.testing.assert_array_equal(found[0]["skipped"], [0, 1, 1, 0, 0])
    assert not np.isfinite(found[0]["loss"][1:3]).any()
    for key in ("loss", "learning_rate"):
        np.testing.assert_array_equal(found[0][key][[0, 3, 4]], expected[0][key])
