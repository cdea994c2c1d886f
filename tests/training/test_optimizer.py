import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mixer_jax.training.optimizer import create_optimizer, create_schedule


def reference(decay_type, step, base, total, warmup, linear_end):
    """REFERENCE section 3, in float64."""
    progress = np.clip((step - warmup) / (total - warmup), 0, 1)
    lr = {
        "cosine": base * 0.5 * (1 + np.cos(np.pi * progress)),
        "linear": linear_end + (base - linear_end) * (1 - progress),
        "constant": base,
    }[decay_type]
    return lr * min(1.0, step / warmup) if warmup else lr


@pytest.mark.parametrize("decay_type", ["cosine", "linear", "constant"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules(decay_type, warmup):
    schedule = create_schedule(decay_type, 0.03, 50, warmup, linear_end=1e-5)
    for step in [0, 1, 6, 7, 8, 30, 49, 50, 60]:
        expected = reference(decay_type, step, 0.03, 50, warmup, 1e-5)
        np.testing.assert_allclose(schedule(jnp.int32(step)), expected, atol=1e-8)


def test_unknown_names():
    with pytest.raises(ValueError, match="'step'; expected one of cosine"):
        create_schedule("step", 0.1, 10, 1)
    with pytest.raises(ValueError, match="'lamb'; expected one of sgd"):
        create_optimizer("lamb", optax.constant_schedule(0.1))


def params():
    return {"Dense_0": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}


def step(tx, grads):
    updates, _ = tx.update(grads, tx.init(params()), params())
    return optax.apply_updates(params(), updates)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_optim_dtype_is_the_accumulators(dtype):
    for name in ("sgd", "adam"):
        state = create_optimizer(
            name, optax.constant_schedule(0.1), optim_dtype=dtype
        ).init(params())
        moments = [x for x in jax.tree.leaves(state) if x.ndim]
        assert jnp.dtype(dtype) in {x.dtype for x in moments}


def test_clip_binds_only_above_the_norm():
    grads = jax.tree.map(jnp.ones_like, params())  # norm 3
    lr = optax.constant_schedule(1.0)
    free = step(create_optimizer("sgd", lr, grad_norm_clip=None), grads)
    slack = step(create_optimizer("sgd", lr, grad_norm_clip=3.5), grads)
    bound = step(create_optimizer("sgd", lr, grad_norm_clip=1.5), grads)
    np.testing.assert_array_equal(free["Dense_0"]["bias"], slack["Dense_0"]["bias"])
    np.testing.assert_allclose(bound["Dense_0"]["bias"], 0.5, atol=1e-6)


def test_weight_decay_is_decoupled_and_spares_biases():
    grads = jax.tree.map(jnp.zeros_like, params())
    tx = create_optimizer("adam", optax.constant_schedule(0.2), weight_decay=0.1)
    after = step(tx, grads)["Dense_0"]
    np.testing.assert_allclose(after["kernel"], 1 - 0.2 * 0.1, rtol=1e-6)
    np.testing.assert_array_equal(after["bias"], 1)
