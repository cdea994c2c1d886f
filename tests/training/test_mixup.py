import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from scipy import stats

from mixer_jax.training.mixup import mixup


def batch(size: int = 8) -> tuple[jax.Array, jax.Array]:
    images = jax.random.normal(jax.random.key(0), (size, 4, 4, 3))
    return images, jax.nn.one_hot(jnp.arange(size) % 5, 5)


def ratio(rng: jax.Array, p: float) -> jax.Array:
    """The λ that mixup draws, read off images of 1 and 0."""
    images = jnp.array([1.0, 0.0])
    return mixup(rng, images, jnp.eye(2), p)[0][0]


def test_mixes_images_and_labels_with_the_batch_rolled_by_one():
    images, labels = batch()
    mixed_images, mixed_labels = mixup(jax.random.key(3), images, labels, 0.5)
    x, y = np.asarray(images, np.float64), np.asarray(labels, np.float64)
    lam = float(ratio(jax.random.key(3), 0.5))
    assert 0.5 <= lam < 1
    for i in range(8):
        want = lam * x[i] + (1 - lam) * x[(i - 1) % 8]
        np.testing.assert_allclose(mixed_images[i], want, atol=1e-6)
        want = lam * y[i] + (1 - lam) * y[(i - 1) % 8]
        np.testing.assert_allclose(mixed_labels[i], want, atol=1e-6)
    np.testing.assert_allclose(mixed_labels.sum(1), 1, atol=1e-6)


@pytest.mark.parametrize("p", [0.2, 0.5, 1.0])
def test_ratio_is_the_larger_part_of_a_beta_draw(p):
    keys = jax.random.split(jax.random.key(1), 4000)
    ratios = jax.vmap(lambda key: ratio(key, p))(keys)
    assert (ratios >= 0.5).all()
    # In float32 as well, which rounds a few in a hundred of Beta(0.2, 0.2) to 1.
    draws = np.random.default_rng(0).beta(p, p, 20_000)
    want = np.maximum(draws, 1 - draws).astype(np.float32)
    assert stats.ks_2samp(ratios, want).pvalue > 0.01


def test_sharding_the_batch_changes_nothing():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    images, labels = batch()
    want = mixup(jax.random.key(0), images, labels, 0.5)
    sharding = NamedSharding(mesh, PartitionSpec("data"))
    found = jax.jit(mixup, static_argnums=3)(
        jax.random.key(0), *jax.device_put((images, labels), sharding), 0.5
    )
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), found, want)


def test_types_are_kept():
    images, labels = batch()
    found = mixup(jax.random.key(0), images.astype("bfloat16"), labels, 0.5)
    assert [x.dtype for x in found] == [jnp.bfloat16, jnp.float32]
    want = mixup(jax.random.key(0), images, labels, 0.5)[0]
    np.testing.assert_allclose(found[0].astype("float32"), want, atol=0.03)


@pytest.mark.parametrize("p", [0, -0.5])
def test_p_that_is_not_positive(p):
    with pytest.raises(ValueError, match="p > 0"):
        mixup(jax.random.key(0), *batch(), p)


def test_integers_and_labels_that_do_not_fit():
    images, labels = batch()
    with pytest.raises(ValueError, match="uint8"):
        mixup(jax.random.key(0), images.astype("uint8"), labels, 0.5)
    for wrong in (labels.argmax(1), labels.astype("int32"), labels[:-1], labels[0]):
        with pytest.raises(ValueError, match=r"one_hot"):
            mixup(jax.random.key(0), images, wrong, 0.5)
