import numpy as np
import pytest
from sklearn.datasets import load_digits
from sklearn.linear_model import Ridge

from mixer_jax.evaluation.fewshot import (
    fewshot_accuracies,
    fit_probe,
    solve_least_squares,
)


@pytest.fixture(scope="module")
def digits():
    features, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    features, labels = features[order], labels[order]
    return features[:900], labels[:900], features[900:], labels[900:]


def first_of_each_class(labels, k):
    seen, chosen = dict.fromkeys(range(10), 0), []
    for i, label in enumerate(labels):
        seen[label] += 1
        if seen[label] <= k:
            chosen.append(i)
    return chosen


@pytest.mark.parametrize("shots", [1, 5, 10, 25])  # 10 and 50 examples < 65 dimensions
@pytest.mark.parametrize("l2_reg", [2.0**10, 1.0])
def test_equals_ridge_regression_of_whitened_features(digits, shots, l2_reg):
    train_x, train_y, test_x, test_y = digits
    chosen = first_of_each_class(train_y, shots)
    x, y = train_x[chosen], train_y[chosen]
    mean, std = x.mean(0), x.std(0) + 1e-5
    design = lambda x: np.column_stack([(x - mean) / std, np.full(len(x), 100.0)])
    ridge = Ridge(alpha=l2_reg, fit_intercept=False, solver="svd")
    ridge.fit(design(x), np.where(y[:, None] == np.arange(10), 1.0, -1.0))
    scores = ridge.predict(design(test_x))

    weights, bias = fit_probe(x, y, 10, l2_reg)
    # A pixel that no example showed has weight 0 in exact arithmetic, but its
    # standard deviation of 1e-5 lifts rounding; hence not closer.
    np.testing.assert_allclose(test_x @ weights + bias, scores, atol=1e-6)
    found = fewshot_accuracies(*digits, 10, shots=(shots,), l2_reg=l2_reg)
    assert found == {shots: np.mean(scores.argmax(1) == test_y)}


def test_more_examples_make_better_probes(digits):
    found = fewshot_accuracies(*digits, 10)
    assert list(found) == [1, 5, 10, 25]
    assert sorted(found.values()) == list(found.values())
    assert found[1] > 0.3
    assert found[25] > 0.85


@pytest.mark.parametrize("shape", [(30, 8), (8, 30), (8, 8)])
def test_solution_is_where_the_gradient_vanishes(shape):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal(shape), rng.standard_normal((shape[0], 3))
    w = solve_least_squares(x, y, 0.7)
    np.testing.assert_allclose(x.T @ (x @ w - y) + 0.7 * w, 0, atol=1e-12)


def test_only_the_first_examples_of_a_class_count(digits):
    train_x, train_y, test_x, test_y = digits
    want = fewshot_accuracies(*digits, 10, shots=(5,))
    chosen = first_of_each_class(train_y, 5)
    poisoned = np.full_like(train_x, 1e6)
    poisoned[chosen] = train_x[chosen]
    assert fewshot_accuracies(poisoned, train_y, test_x, test_y, 10, (5,)) == want
    # The order of the classes does not matter.
    by_class = np.argsort(train_y, kind="stable")
    found = fewshot_accuracies(
        train_x[by_class], train_y[by_class], test_x, test_y, 10, (5,)
    )
    assert found == want


def test_a_class_with_fewer_examples_gives_all(digits):
    train_x, train_y, test_x, test_y = digits
    chosen = first_of_each_class(train_y, 3)
    few = train_x[chosen], train_y[chosen], test_x, test_y
    found = fewshot_accuracies(*few, 10, shots=(3, 25))
    assert found[3] == found[25]


def test_units_of_features_do_not_matter(digits):
    train_x, train_y, test_x, test_y = digits
    kept = train_x[first_of_each_class(train_y, 1)].std(0) > 1
    train_x, test_x = train_x[:, kept], test_x[:, kept]
    scale = np.random.default_rng(0).uniform(10, 1e3, kept.sum())
    found = fewshot_accuracies(
        train_x * scale + 50, train_y, test_x * scale + 50, test_y, 10
    )
    want = fewshot_accuracies(train_x, train_y, test_x, test_y, 10)
    assert found == pytest.approx(want, abs=2e-3)


def test_takes_float32_and_jax_arrays(digits):
    import jax.numpy as jnp

    want = fewshot_accuracies(*digits, 10, shots=(5,))
    found = fewshot_accuracies(*map(jnp.asarray, digits), 10, shots=(5,))
    assert found == want


def test_bad_input(digits):
    train_x, train_y, test_x, test_y = digits
    fails = lambda match: pytest.raises(ValueError, match=match)
    with fails("train_features have shape"):
        fewshot_accuracies(train_x[1:], train_y, test_x, test_y, 10)
    with fails("in float64"):
        fewshot_accuracies(train_x, train_y, test_x, test_y.astype(float), 10)
    with fails("64 dimensions and test features 60"):
        fewshot_accuracies(train_x, train_y, test_x[:, :60], test_y, 10)
    with fails("test_labels are from 0 to 9, but num_classes=9"):
        keep = train_y < 9
        fewshot_accuracies(train_x[keep], train_y[keep], test_x, test_y, 9)
    with fails(r"Of 12 classes, \[10, 11\] have no training example"):
        fewshot_accuracies(*digits, 12)
    with fails(r"shots=\(0, 5\)"):
        fewshot_accuracies(*digits, 10, shots=(0, 5))
