import csv
import dataclasses
import io
import json
import struct

import cv2
import jax
import numpy as np
import pytest
from scipy.special import expit, softmax

from mixer_jax.data.walk import find_images
from mixer_jax.evaluation import prediction
from mixer_jax.weights.layout import CheckpointError


def predict(loaded, files, **options):
    return prediction.predict(
        loaded.model,
        loaded.params,
        loaded.transform,
        files,
        class_names=loaded.class_names,
        **options,
    )


@pytest.fixture(scope="module")
def photos(tmp_path_factory, write_image):
    """A folder of five images, a broken one and a text; and the images' pixels."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    names = ["a.png", "b.PNG", "c/d.png", "c/e.webp", "f.png"]
    images = rng.integers(0, 256, (5, 16, 16, 3), np.uint8)
    for name, image in zip(names, images, strict=True):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        lossless = [cv2.IMWRITE_WEBP_QUALITY, 101]
        data = cv2.imencode(path.suffix.lower(), image[..., ::-1], lossless)[1]
        path.write_bytes(data.tobytes())
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff no JPEG")
    (folder / "notes.txt").write_text("no image")
    return folder, images


@pytest.mark.parametrize("batch_size", [2, 64])
def test_predictions_equal_the_softmax_of_the_logits(
    loaded, logits, photos, batch_size
):
    folder, images = photos
    files = find_images([str(folder)])
    found = list(predict(loaded, files, top_k=3, batch_size=batch_size))
    assert [x.file for x in found] == files
    broken = found.pop(2)
    assert "JPEG is" in broken.error
    assert not broken.classes
    for x, scores in zip(found, softmax(logits(images), axis=1), strict=True):
        assert x.error is None
        assert list(x.classes) == np.argsort(-scores)[:3].tolist()
        assert list(x.names) == [loaded.class_names[i] for i in x.classes]
        np.testing.assert_allclose(x.probabilities, np.sort(scores)[:-4:-1], atol=1e-5)


def test_all_classes_at_most_and_numbers_for_names(loaded, photos):
    nameless = dataclasses.replace(loaded, class_names=None)
    file = str(photos[0] / "a.png")
    [found] = predict(nameless, [file], top_k=99)
    assert sorted(found.names) == list("0123456")
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-5)


def test_unreadable_files_only(loaded, photos, tmp_path):
    files = [str(photos[0] / "broken.jpg"), str(tmp_path), str(tmp_path / "gone.png")]
    found = list(predict(loaded, files))
    assert [x.error for x in found[1:]] == [
        "Is a directory",
        "No such file or directory",
    ]
    assert list(predict(loaded, [])) == []


def test_nan_is_no_prediction(loaded, photos):
    head = jax.tree.map(lambda x: x * np.nan, loaded.params["head"])
    broken = dataclasses.replace(loaded, params=loaded.params | {"head": head})
    [found] = predict(broken, [str(photos[0] / "a.png")])
    assert (found.error, found.classes) == ("the model's logits are NaN", ())


def test_photos_are_turned_upright(loaded, tmp_path):
    """A camera held sideways notes so (EXIF orientation 6) and leaves pixels as is."""
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    image = cv2.GaussianBlur(image, (5, 5), 0)
    jpeg = cv2.imencode(".jpg", image)[1].tobytes()
    entry = struct.pack("<HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0II*\0\x08\0\0\0\x01\0" + entry + bytes(4)
    segment = b"\xff\xe1" + struct.pack(">H", len(exif) + 2) + exif
    (tmp_path / "plain.jpg").write_bytes(jpeg)
    (tmp_path / "sideways.jpg").write_bytes(jpeg[:2] + segment + jpeg[2:])
    decoded = cv2.imdecode(np.frombuffer(jpeg, np.uint8), cv2.IMREAD_COLOR)
    upright = cv2.rotate(decoded, cv2.ROTATE_90_CLOCKWISE)
    cv2.imwrite(str(tmp_path / "upright.png"), upright)
    files = [str(tmp_path / x) for x in ("plain.jpg", "sideways.jpg", "upright.png")]
    plain, sideways, upright = predict(loaded, files, top_k=7)
    assert sideways.probabilities == pytest.approx(upright.probabilities, abs=1e-6)
    assert sideways.probabilities != pytest.approx(plain.probabilities, abs=1e-3)


def test_formats():
    found = [
        prediction.Prediction("a.png", [1, 0], ["élan, elk", "ant"], [0.75, 0.25]),
        prediction.Prediction("broken.png", error="the file is empty"),
        prediction.Prediction("folder/b.png", [0, 1], ["ant", "élan, elk"], [0.9, 0.1]),
    ]
    table = prediction.format_predictions(found, "table").splitlines()
    assert table[0] == "a.png          75.0%  élan, elk"
    assert table[1] == "               25.0%  ant"
    assert table[2] == "folder/b.png   90.0%  ant"
    rows = list(
        csv.DictReader(io.StringIO(prediction.format_predictions(found, "csv")))
    )
    assert rows[0] == {
        "file": "a.png",
        "rank": "1",
        "class": "1",
        "name": "élan, elk",
        "probability": "0.75",
    }
    assert [(x["file"], x["rank"]) for x in rows[1:]] == [
        ("a.png", "2"),
        ("folder/b.png", "1"),
        ("folder/b.png", "2"),
    ]
    fields = json.loads(prediction.format_predictions(found, "json"))
    assert [prediction.Prediction(**x) for x in fields] == [
        dataclasses.replace(x, classes=list(x.classes), names=list(x.names))
        if x.classes
        else dataclasses.replace(x, classes=[], names=[], probabilities=[])
        for x in found
    ]


def test_model_without_a_head(loaded):
    headless = dataclasses.replace(
        loaded, model=loaded.model.clone(num_classes=0), class_names=None
    )
    with pytest.raises(CheckpointError, match="no head"):
        next(predict(headless, ["a.png"]))


def test_each_class_has_its_own_probability_where_several_may_be_right(
    loaded, logits, photos
):
    folder, images = photos
    found = list(predict(loaded, [str(folder / "a.png")], multilabel=True, top_k=7))
    scores = logits(images[:1])[0]
    assert list(found[0].classes) == np.argsort(-scores).tolist()
    np.testing.assert_allclose(
        found[0].probabilities, np.sort(expit(scores))[::-1], rtol=1e-5
    )
