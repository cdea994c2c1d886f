import dataclasses
import json
import logging
import os

import jax
import numpy as np
import pytest
from scipy.special import log_expit, log_softmax
from sklearn.metrics import average_precision_score

from mixer_jax.data.dataset import DatasetError, Example, open_dataset
from mixer_jax.data.imagenet import imagenet_names
from mixer_jax.evaluation import classification
from mixer_jax.training.losses import softmax_cross_entropy
from mixer_jax.training.step import make_eval_step
from mixer_jax.weights.layout import CheckpointError


def score(loaded, dataset, split, **options):
    return classification.evaluate_dataset(
        loaded.model,
        loaded.params,
        loaded.transform,
        dataset,
        split,
        class_names=loaded.class_names,
        loss_fn=loaded.loss_fn,
        **options,
    )


@pytest.fixture(scope="module")
def folder(loaded, tmp_path_factory, write_image):
    """Three random images of each class, one of them unreadable, and their pixels."""
    root = tmp_path_factory.mktemp("dataset")
    rng = np.random.default_rng(0)
    images, labels = [], []
    for label, name in enumerate(loaded.class_names):
        for i in range(3):
            images.append(rng.integers(0, 256, (16, 16, 3), np.uint8))
            labels.append(label)
            write_image(root / name / f"{i}.png", images[-1])
    (root / "ant" / "broken.png").write_bytes(b"no image")
    return root, images, np.array(labels)


@pytest.mark.parametrize("batch_size", [13, 64])
def test_report_equals_what_numpy_makes_of_the_logits(
    loaded, folder, logits, batch_size
):
    root, images, labels = folder
    report = score(loaded, open_dataset(str(root)), "train", batch_size=batch_size)
    scores = logits(images)
    order = np.argsort(-scores, axis=1)
    predictions = order[:, 0]
    losses = -log_softmax(scores, axis=1)[np.arange(21), labels]
    expected = {
        "top1": np.mean(predictions == labels),
        "top5": np.mean((order[:, :5] == labels[:, None]).any(1)),
        "loss": losses.mean(),
        "count": 21,  # the unreadable one does not count
    }
    assert 0 < expected["top1"] < expected["top5"] < 1
    assert report.metrics == pytest.approx(expected, rel=1e-5)
    np.testing.assert_array_equal(report.labels, labels)
    np.testing.assert_array_equal(report.predictions, predictions)
    matrix = np.zeros((7, 7), int)
    for label, prediction in zip(labels, predictions, strict=True):
        matrix[label, prediction] += 1
    np.testing.assert_array_equal(report.confusion_matrix(), matrix)
    accuracies, counts = report.class_scores()
    np.testing.assert_array_equal(counts, [3] * 7)
    np.testing.assert_allclose(accuracies, np.diag(matrix) / 3)


def test_the_loss_is_the_run_s(loaded, folder, logits):
    root, images, labels = folder
    run = dataclasses.replace(loaded, config={"loss": "sigmoid"})
    report = score(run, open_dataset(str(root)), "train")
    scores, targets = logits(images), np.eye(7)[labels]
    losses = -log_expit(scores) * targets - log_expit(-scores) * (1 - targets)
    assert report.metrics["loss"] == pytest.approx(losses.sum(1).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("label", "message"), [(-1, "have no labels"), ((1, 2), "have several labels")]
)
def test_datasets_without_one_label_for_each_image(loaded, label, message):
    class Odd:
        class_names = loaded.class_names

        def split(self, expression):
            del expression
            return [Example(np.zeros((16, 16, 3), np.uint8), label, "odd")]

    with pytest.raises(DatasetError, match=message):
        score(loaded, Odd(), "test")


def test_predictions_cost_no_second_forward_pass(loaded):
    batch = {
        "image": np.zeros((8, 16, 16, 3), np.uint8),
        "label": np.zeros(8, np.int32),
        "mask": np.ones(8, np.float32),
    }
    flops = []
    for report in (False, True):
        step = jax.jit(
            make_eval_step(loaded.model, softmax_cross_entropy, report=report)
        )
        compiled = step.lower(loaded.params, batch).compile()
        flops.append(compiled.cost_analysis()["flops"])
    assert flops[1] < 1.05 * flops[0]


def test_one_rule_for_equal_logits_and_for_nan(loaded, folder):
    """Every number counts the same prediction; a zero head predicts class 0."""
    dataset = open_dataset(str(folder[0]))
    zero = jax.tree.map(np.zeros_like, loaded.params["head"])
    run = dataclasses.replace(loaded, params=loaded.params | {"head": zero})
    report = score(run, dataset, "train")
    assert report.metrics["top1"] == pytest.approx(1 / 7)
    assert report.metrics["top5"] == pytest.approx(5 / 7)
    accuracies, counts = report.class_scores()
    np.testing.assert_array_equal(accuracies, [1, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(report.confusion_matrix()[:, 0], counts)
    zero["bias"][3] = np.nan
    report = score(run, dataset, "train")
    assert (report.metrics["top1"], report.metrics["top5"]) == (0, 0)
    np.testing.assert_array_equal(report.class_scores()[0], [0] * 7)
    assert not report.confusion_matrix().any()
    assert set(report.predictions) == {-1}


def test_fewer_classes_in_another_order(loaded, folder, tmp_path):
    root, _, _ = folder
    (tmp_path / "some.csv").write_text(
        "path,label\n" + "".join(f"{root}/{n}/1.png,{n}\n" for n in ("gnu", "bee"))
    )
    report = score(loaded, open_dataset(str(tmp_path / "some.csv")), "train")
    assert report.labels.tolist() == [6, 1]
    accuracies, counts = report.class_scores()
    assert counts.tolist() == [0, 1, 0, 0, 0, 0, 1]
    assert np.isnan(accuracies[0])
    classes = json.loads(json.dumps(report.as_dict()))["classes"]
    assert classes[0] == {"name": "ant", "top1": None, "count": 0}
    assert classes[6] == {"name": "gnu", "top1": accuracies[6], "count": 1}


def test_imagenet_classes_match_by_wordnet_id(loaded, folder, tmp_path):
    root, _, _ = folder
    head = {
        "kernel": np.zeros((12, 1000), "float32"),
        "bias": np.eye(1000, dtype="float32")[517],  # n03126707, the machine
    }
    model = loaded.model.clone(num_classes=1000)
    imagenet = dataclasses.replace(
        loaded,
        model=model,
        params=loaded.params | {"head": head},
        class_names=imagenet_names(),
    )
    for synset, name in ("n02012849", "ant"), ("n03126707", "bee"):
        os.makedirs(tmp_path / synset)
        (tmp_path / synset / "0.png").write_bytes((root / name / "0.png").read_bytes())
    report = score(imagenet, open_dataset(str(tmp_path)), "train")
    assert report.labels.tolist() == [134, 517]
    assert report.predictions.tolist() == [517, 517]
    assert report.metrics["top1"] == 0.5


def test_what_cannot_be_scored(loaded, folder, tmp_path, caplog):
    dataset = open_dataset(str(folder[0]))

    def evaluate(**changes):
        other = dataclasses.replace(loaded, **changes)
        return score(other, dataset, "train")

    with pytest.raises(
        DatasetError, match=r"for 2 of the dataset's 7 .* ant, bee\. The"
    ):
        evaluate(class_names=["a", "b", *loaded.class_names[2:]])
    with caplog.at_level(logging.WARNING):
        evaluate(class_names=None)  # nobody knows whether the order is the same
    assert "have no names: the dataset's are taken in their order" in caplog.text
    six = loaded.model.clone(num_classes=6)
    with pytest.raises(DatasetError, match=r"has 7 classes and the model.* 6\. Name"):
        evaluate(model=six, class_names=None)
    with pytest.raises(CheckpointError, match="no head"):
        evaluate(model=loaded.model.clone(num_classes=None), class_names=None)
    (tmp_path / "ant").mkdir()
    (tmp_path / "ant" / "broken.png").touch()
    dataset = open_dataset(str(tmp_path))
    with pytest.raises(DatasetError, match="None of the examples"):
        evaluate()


@pytest.mark.parametrize("levels", [3, 10**6])
def test_average_precision_is_scikit_learn_s(levels):
    """With many equal scores, and with hardly any."""
    rng = np.random.default_rng(0)
    scores = (rng.integers(0, levels, (200, 5)) / levels).astype(np.float32)
    labels = (rng.random((200, 5)) < [0.02, 0.1, 0.5, 0.9, 1.0]).astype(np.float32)
    found = classification.average_precisions(scores, labels)
    expected = [average_precision_score(labels[:, i], scores[:, i]) for i in range(5)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    order = rng.permutation(200)
    again = classification.average_precisions(scores[order], labels[order])
    np.testing.assert_array_equal(again, found)


def test_average_precision_by_hand():
    scores = np.array([[4, 1, 0], [3, 1, 0], [2, 1, 0], [1, np.nan, 0]], np.float32)
    labels = np.array([[1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 0]], np.float32)
    found = classification.average_precisions(scores, labels)
    # The hits of the first class are at 1 of 1 and 2 of 3. Of the second, three images
    # come together, with one hit, and the NaN last. No image has the third.
    np.testing.assert_allclose(found, [(1 + 2 / 3) / 2, (1 / 3 + 2 / 4) / 2, np.nan])


@pytest.fixture
def table(folder, tmp_path):
    """Images with several labels, of classes in another order; and their labels."""
    root, _, labels = folder
    rng = np.random.default_rng(1)
    several = np.eye(7)[labels] + (rng.random((21, 7)) < 0.2) > 0
    several[:, 6] = False
    several[4] = False
    paths = [f"{root}/{n}/{i}.png" for n in sorted(os.listdir(root)) for i in range(3)]
    names = np.array(["ant", "bee", "cat", "dog", "eel", "fox", "gnu"])
    rows = [
        f"{path},{'|'.join(names[row])}"
        for path, row in zip(paths, several, strict=True)
    ]
    rows.append(f"{root}/ant/broken.png,ant")
    (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]) + "\n")
    (tmp_path / "classes.txt").write_text("\n".join(names[[3, 0, 5, 1, 2, 4]]))
    return tmp_path / "t.csv", several


@pytest.mark.parametrize("batch_size", [8, 64])
def test_report_of_several_labels(loaded, folder, logits, table, batch_size):
    path, labels = table
    run = dataclasses.replace(loaded, config={"loss": "sigmoid"})
    report = score(
        run,
        open_dataset(str(path)),
        "train",
        multilabel=True,
        batch_size=batch_size,
    )
    scores = logits(folder[1])
    precisions = [average_precision_score(labels[:, i], scores[:, i]) for i in range(6)]
    losses = -log_expit(scores) * labels - log_expit(-scores) * ~labels
    assert not labels.any(1).all()
    hits = labels[np.arange(21), scores.argmax(1)]
    assert report.metrics == pytest.approx(
        {
            "mAP": np.mean(precisions),  # of the classes that some image has
            "top1": hits.sum() / labels.any(1).sum(),  # of the images that have one
            "top5": report.metrics["top5"],
            "loss": losses.sum(1).mean(),
            "count": 21,
        },
        rel=1e-5,
    )
    found, counts = report.class_scores()
    np.testing.assert_allclose(found, [*precisions, np.nan], rtol=1e-6)
    np.testing.assert_array_equal(counts, labels.sum(0))
    classes = json.loads(json.dumps(report.as_dict()))["classes"]
    assert classes[6] == {"name": "gnu", "average_precision": None, "count": 0}
    assert classes[0]["average_precision"] == pytest.approx(precisions[0])
    with pytest.raises(DatasetError, match="no confusion matrix"):
        report.confusion_matrix()


def test_one_label_an_image_for_a_model_that_finds_several(loaded, folder, logits):
    root, images, labels = folder
    report = score(loaded, open_dataset(str(root)), "train", multilabel=True)
    scores = logits(images)
    precisions = [average_precision_score(labels == i, scores[:, i]) for i in range(7)]
    assert report.metrics["mAP"] == pytest.approx(np.mean(precisions), rel=1e-6)
    single = score(loaded, open_dataset(str(root)), "train").metrics
    assert {k: report.metrics[k] for k in single} == pytest.approx(single)


def test_an_image_without_a_label_among_others_does_not_count(loaded):
    class Some:
        class_names = loaded.class_names

        def split(self, expression):
            image = np.zeros((16, 16, 3), np.uint8)
            return [Example(image, label, expression) for label in (6, -1, 6)]

    assert score(loaded, Some(), "test").metrics["count"] == 2
