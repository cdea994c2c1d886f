import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from mixer_jax.training.losses import (
    sigmoid_cross_entropy,
    smooth_labels,
    softmax_cross_entropy,
)

LOSSES = [softmax_cross_entropy, sigmoid_cross_entropy]


def softmax_closed_form(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return (y * (np.log(np.exp(x).sum(-1, keepdims=True)) - x)).sum(-1)


def sigmoid_closed_form(x, y):
    x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
    return (y * np.log1p(np.exp(-x)) + (1 - y) * np.log1p(np.exp(x))).sum(-1)


def examples() -> tuple[jax.Array, jax.Array, jax.Array]:
    """Logits, integer labels, probabilities."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(5 * rng.standard_normal((16, 9)), jnp.float32)
    probabilities = jnp.asarray(rng.dirichlet(np.ones(9), 16), jnp.float32)
    return logits, jnp.asarray(rng.integers(0, 9, 16)), probabilities


@pytest.mark.parametrize(
    ("loss", "closed_form"),
    [
        (softmax_cross_entropy, softmax_closed_form),
        (sigmoid_cross_entropy, sigmoid_closed_form),
    ],
)
def test_closed_form(loss, closed_form):
    logits, integers, probabilities = examples()
    found = loss(logits, probabilities)
    assert (found.shape, found.dtype) == ((16,), jnp.float32)
    np.testing.assert_allclose(found, closed_form(logits, probabilities), rtol=2e-6)
    want = closed_form(logits, np.eye(9)[integers])
    np.testing.assert_allclose(loss(logits, integers), want, rtol=2e-6, atol=1e-6)


def test_equal_optax_and_the_original(golden):
    logits, integers, probabilities = examples()
    np.testing.assert_array_equal(
        sigmoid_cross_entropy(logits, probabilities),
        optax.sigmoid_binary_cross_entropy(logits, probabilities).sum(-1),
    )
    np.testing.assert_array_equal(
        softmax_cross_entropy(logits, integers),
        optax.softmax_cross_entropy_with_integer_labels(logits, integers),
    )
    data = golden.load("forward.npz")
    loss = softmax_cross_entropy(jnp.asarray(data["logits"]), data["labels"]).mean()
    np.testing.assert_allclose(loss, data["loss"], atol=1e-6)


@pytest.mark.parametrize("loss", LOSSES)
def test_large_logits_stay_finite(loss):
    logits = jnp.array([[1e4, -1e4, 0.0], [-1e4, 1e4, 0.0]])
    grads = jax.grad(lambda x: loss(x, jnp.array([0, 0])).sum())(logits)
    found = loss(logits, jnp.array([0, 0]))
    assert jnp.isfinite(grads).all()
    assert found[0] < 1
    assert found[1] >= 2e4


@pytest.mark.parametrize("loss", LOSSES)
def test_bfloat16_logits_are_computed_in_float32(loss):
    logits, integers, probabilities = examples()
    logits = logits.astype(jnp.bfloat16)
    for labels in (integers, probabilities):
        found = loss(logits, labels)
        assert found.dtype == jnp.float32
        np.testing.assert_array_equal(found, loss(logits.astype("float32"), labels))


def test_softmax_of_integers_makes_no_one_hot():
    """With 21,843 classes that would be as large as the logits."""

    def intermediates(jaxpr):
        for equation in jaxpr.eqns:
            yield from (variable.aval for variable in equation.outvars)
            for inner in jaxprs_in_params(equation.params):
                yield from intermediates(inner)

    def made(loss):
        logits, integers, _ = examples()
        jaxpr = jax.make_jaxpr(loss)(logits, integers).jaxpr
        return {x.dtype for x in intermediates(jaxpr) if x.shape == logits.shape}

    assert made(softmax_cross_entropy) == {jnp.dtype("float32")}
    assert jnp.dtype("bool") in made(sigmoid_cross_entropy)  # what is looked for


def test_initial_bias_sets_the_sigmoid_loss():
    # big_vision's -6.9 makes 1000 classes cost about log(1000) + 1 at the first step.
    found = sigmoid_cross_entropy(jnp.full((1, 1000), -6.9), jnp.array([3]))
    want = 999 * np.log1p(np.exp(-6.9)) + np.log1p(np.exp(6.9))
    np.testing.assert_allclose(found, [want], rtol=1e-5)


def test_label_smoothing_is_a_mixture_with_the_uniform_distribution():
    logits, integers, probabilities = examples()
    one_hot = jax.nn.one_hot(integers, 9)
    np.testing.assert_array_equal(smooth_labels(probabilities, 0.0), probabilities)
    np.testing.assert_allclose(smooth_labels(one_hot, 0.1).sum(-1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        smooth_labels(one_hot, 0.1), optax.smooth_labels(one_hot, 0.1), rtol=1e-6
    )
    np.testing.assert_allclose(
        softmax_cross_entropy(logits, smooth_labels(one_hot, 0.3)),
        0.7 * softmax_closed_form(logits, one_hot)
        + 0.3 * softmax_closed_form(logits, np.full((16, 9), 1 / 9)),
        rtol=2e-6,
    )


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_that_do_not_fit(loss):
    logits, integers, probabilities = examples()
    for labels in (
        integers[:-1],
        integers[:, None],
        probabilities[:, :-1],
        probabilities[:, 0],
        probabilities.astype("int32"),  # a one-hot in integers is ambiguous
    ):
        with pytest.raises(ValueError, match="do not fit logits of shape"):
            loss(logits, labels)


def test_smoothing_that_is_not_possible():
    with pytest.raises(ValueError, match=r"eps=1\.5"):
        smooth_labels(jnp.eye(3), 1.5)
    with pytest.raises(ValueError, match="one_hot"):
        smooth_labels(jnp.array([1, 2]), 0.1)
