import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from mixer_jax.model import MlpMixer, Patches
from mixer_jax.training import losses, sharding
from mixer_jax.training.optimizer import create_optimizer, create_schedule
from mixer_jax.training.step import TrainState, make_eval_step, make_train_step

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


def run(mesh, tx, schedule, loss_fn, params, batches, accum_steps=1):
    """Trains over `batches` and returns the metrics by step and the parameters."""
    state = TrainState(jnp.zeros((), jnp.int32), params, tx.init(params))
    where = sharding.state_shardings(mesh, state)
    state = jax.device_put(state, where)
    step = jax.jit(
        make_train_step(MODEL, tx, schedule, loss_fn, accum_steps),
        in_shardings=(where, sharding.batch_sharding(mesh), sharding.replicated(mesh)),
        out_shardings=(where, sharding.replicated(mesh)),
        donate_argnums=0,
    )
    rows = []
    with jax.set_mesh(mesh):
        for images, labels in batches:
            batch = {"image": images, "label": labels.astype(np.int32)}
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


def test_evaluation_against_numpy_and_without_masked_rows(golden):
    data = golden.load("forward.npz")
    params = golden.tree(data, "params/")
    labels, mask = data["labels"], np.array([1, 1, 0, 1, 0], np.float32)
    evaluate = make_eval_step(MODEL, losses.softmax_cross_entropy)
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


def test_constant_logits_are_not_right_by_accident():
    """A head that is still zero says nothing, and scores nothing."""
    images = jnp.zeros((4, 16, 16, 3))
    params = MODEL.init(jax.random.key(0), images, train=False)["params"]
    sums = make_eval_step(MODEL, losses.softmax_cross_entropy)(
        params, {"image": images, "label": jnp.zeros(4, jnp.int32), "mask": jnp.ones(4)}
    )
    assert sums["top1"] == 0
