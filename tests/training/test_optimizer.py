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


MULTIPLIERS = (("head/.*", 2.0), (".*/bias", 0.0), ("frozen/.*", 0.0))


def trees():
    leaf = lambda: {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}
    return {"head": leaf(), "body": leaf(), "frozen": leaf()}


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_multipliers_scale_and_freeze_by_the_first_match(name):
    lr = optax.constant_schedule(0.01)
    kwargs = {"grad_norm_clip": None, "weight_decay": 0.1}
    grads = jax.tree.map(lambda x: 0.5 * x, trees())
    plain = create_optimizer(name, lr, **kwargs)
    tx = create_optimizer(name, lr, lr_multipliers=MULTIPLIERS, **kwargs)
    expected, _ = plain.update(grads, plain.init(trees()), trees())
    found, _ = jax.jit(tx.update)(grads, tx.init(trees()), trees())
    for part, leaf, factor in [
        ("head", "kernel", 2),
        ("head", "bias", 2),
        ("body", "kernel", 1),
        ("body", "bias", 0),
        ("frozen", "kernel", 0),
        ("frozen", "bias", 0),
    ]:
        np.testing.assert_allclose(
            found[part][leaf], factor * expected[part][leaf], rtol=1e-6
        )


def test_frozen_parameters_have_no_state_and_do_not_bind_the_clip():
    lr = optax.constant_schedule(1.0)
    only_head = (("head/.*", 1.0), (".*", 0.0))
    tx = create_optimizer("sgd", lr, grad_norm_clip=1.0, lr_multipliers=only_head)
    state = tx.init(trees())
    assert sum(x.size for x in jax.tree.leaves(state) if x.ndim) == 9  # the head's
    grads = trees()  # norm 3 in each part
    found, _ = tx.update(grads, state, trees())
    np.testing.assert_allclose(found["head"]["bias"], -1 / 3, atol=2e-3)  # bfloat16
    assert not found["body"]["kernel"].any()


def test_pattern_without_a_parameter():
    lr = optax.constant_schedule(1.0)
    tx = create_optimizer("sgd", lr, lr_multipliers=(("heads/.*", 1.0), (".*", 0.0)))
    with pytest.raises(ValueError, match=r"heads/\.\* decides for no parameter"):
        tx.init(trees())
