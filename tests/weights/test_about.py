"""What arrays cannot say stands beside an npz file, and in a safetensors file."""

import json

import pytest

from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.run.keys import KEYS
from mixer_jax.weights.about import (
    About,
    about_model,
    beside,
    from_metadata,
    read_beside,
    to_metadata,
    write_beside,
)
from mixer_jax.weights.layout import CheckpointError

TRANSFORM = EvalTransform(
    (16, 24),
    "torchvision",
    (18, 27),
    interpolation="pil_bicubic",
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)


@pytest.fixture
def about(tiny):
    model = tiny.sizes.create_model(gelu="erf", layer_norm_epsilon=1e-5)
    return about_model(
        model.clone(model_name="tiny"), TRANSFORM, ["a", "b", "c", "d", "é\udce9"]
    )


def test_it_comes_back_as_it_was(about, tmp_path):
    write_beside(tmp_path / "a.npz", about)
    assert sorted(x.name for x in tmp_path.iterdir()) == ["a.npz.json"]
    for found in (
        read_beside(tmp_path / "a.npz"),
        from_metadata("a", to_metadata(about)),
    ):
        assert (
            found.fields
            == about.fields
            == {
                "model_name": "tiny",
                "gelu": "erf",
                "layer_norm_epsilon": 1e-5,
            }
        )
        assert EvalTransform(**found.transform) == TRANSFORM
        assert found.class_names == about.class_names


@pytest.mark.parametrize("epsilon", [0, 1.0, 2])
def test_all_that_a_config_allows_can_be_read(tiny, tmp_path, epsilon):
    transform = EvalTransform(
        12, "torchvision", 256, interpolation="bilinear", std=1e-7
    )
    values = {"layer_norm_epsilon": epsilon, "std": 1e-7, "resize": 256}
    for row, value in values.items():
        (key,) = (x for x in KEYS if x in (f"model.{row}", f"pp.{row}"))
        assert KEYS[key].include(value)
    model = tiny.sizes.create_model(layer_norm_epsilon=epsilon)
    about = about_model(model, transform, ["", " ", "a"])
    write_beside(tmp_path / "a.npz", about)
    for found in (
        read_beside(tmp_path / "a.npz"),
        from_metadata("a", to_metadata(about)),
    ):
        assert found.fields["layer_norm_epsilon"] == epsilon
        assert EvalTransform(**found.transform) == transform
        assert found.class_names == ["", " ", "a"]


def test_what_is_not_known_is_not_said(tmp_path):
    assert read_beside(tmp_path / "a.npz") == About() == from_metadata("a", {})
    write_beside(tmp_path / "a.npz", About({"gelu": "erf"}))
    assert json.loads(beside(tmp_path / "a.npz").read_text()) == {"gelu": "erf"}
    assert to_metadata(About({"gelu": "erf"})) == {"gelu": "erf"}
    other = {"format": "pt", "note": "any text", "gelu": "tanh"}
    assert from_metadata("a", other) == About({"gelu": "tanh"})


def test_permuted_pixels_cannot_be_said(tiny):
    transform = EvalTransform(16, permute=lambda image: image)
    assert about_model(tiny.sizes.create_model(), transform, None).transform == {}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["gelu"], "expected an object"),
        ({"gelu": "relu"}, "gelu is 'relu', expected tanh or erf"),
        ({"layer_norm_epsilon": "small"}, "epsilon is 'small', expected a number"),
        ({"class_names": [1, 2]}, r"class_names is \[1, 2\], expected a list of names"),
        ({"transform": {"size": 3}}, "transform is {'size': 3}"),
        ({"transform": {"evaluation": "squeeze"}}, "squeeze"),
    ],
)
def test_what_is_damaged_is_named(tmp_path, values, message):
    path = beside(tmp_path / "a.npz")
    path.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=message) as error:
        read_beside(tmp_path / "a.npz")
    assert str(error.value).startswith(f"{path}: ")
    path.write_text("{")
    with pytest.raises(CheckpointError, match=r"a\.npz\.json is no JSON file"):
        read_beside(tmp_path / "a.npz")
    with pytest.raises(CheckpointError, match="its metadata are no JSON"):
        from_metadata(path, {"class_names": "["})
