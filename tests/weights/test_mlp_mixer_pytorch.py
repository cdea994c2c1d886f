"""Parameters of mlp-mixer-pytorch, as the package itself made them."""

import dataclasses

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixer_jax.variants import Patches
from mixer_jax.weights import layout, pytorch
from mixer_jax.weights.about import About
from mixer_jax.weights.mlp_mixer_pytorch import MLP_MIXER_PYTORCH

NAME = "mlp-mixer-pytorch"


@pytest.fixture
def path(golden):
    return golden.path / "mlp_mixer_pytorch.safetensors"


def test_logits_and_features_of_the_package(golden, path):
    expected = golden.load("mlp_mixer_pytorch_expected.npz")
    params = pytorch.read_pytorch(path)
    sizes = layout.infer_model(params)
    assert sizes.variant.patches == Patches((8, 8))
    assert (sizes.num_tokens, sizes.variant.tokens_mlp_dim) == (24, 96)
    logits = {}
    for change in ({}, {"gelu": "tanh"}, {"layer_norm_epsilon": 1e-6}):
        model = sizes.create_model(**{**MLP_MIXER_PYTORCH.fields, **change})
        logits[str(change)], state = model.apply(
            {"params": params},
            expected["images"],
            train=False,
            mutable=["intermediates"],
        )
        if not change:
            pre_logits = state["intermediates"]["pre_logits"][0]
    found, tanh, epsilon = logits.values()
    np.testing.assert_allclose(found, expected["logits"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(pre_logits, expected["pre_logits"], atol=1e-5, rtol=0)
    # The data tell both fields apart, or the check above would say nothing.
    assert np.abs(tanh - expected["logits"]).max() > 1e-4
    assert np.abs(epsilon - expected["logits"]).max() > 1e-2


def test_written_back_every_tensor_is_the_same_to_the_byte(path, tmp_path, caplog):
    about = About(MLP_MIXER_PYTORCH.fields)
    written = tmp_path / "a.safetensors"
    pytorch.save_pytorch(written, pytorch.read_pytorch(path), NAME, about)
    found, expected = load_file(written), load_file(path)
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        assert found[name].tobytes() == array.tobytes(), name
    assert caplog.text == ""


@pytest.mark.parametrize("image_channels", [1, 3])
@pytest.mark.parametrize("num_classes", [5, None])
def test_any_sizes_come_back(tiny, tmp_path, assert_same, image_channels, num_classes):
    sizes = dataclasses.replace(
        tiny.sizes, image_channels=image_channels, num_classes=num_classes
    )
    path = tmp_path / "a.safetensors"
    pytorch.save_pytorch(path, tiny.tree(sizes), NAME, About())
    assert_same(pytorch.read_pytorch(path), tiny.tree(sizes))
    assert pytorch.read_pytorch_header(path).package.name == NAME
    prefixed = {f"model.module.{k}": x for k, x in load_file(path).items()}
    save_file(prefixed, path)
    assert_same(pytorch.read_pytorch(path), tiny.tree(sizes))


def test_what_the_package_computes_otherwise_is_said(tiny, tmp_path, caplog):
    about = About({"gelu": "tanh", "layer_norm_epsilon": 1e-6})
    pytorch.save_pytorch(tmp_path / "a.safetensors", tiny.tree(), NAME, about)
    (message,) = caplog.messages
    assert message.endswith(
        "mlp-mixer-pytorch computes with gelu erf, layer_norm_epsilon 1e-05; these "
        "parameters were trained with gelu tanh, layer_norm_epsilon 1e-06"
    )
    caplog.clear()
    about = About(MLP_MIXER_PYTORCH.fields)  # timm has another epsilon
    pytorch.save_pytorch(tmp_path / "b.safetensors", tiny.tree(), "timm", about)
    (message,) = caplog.messages
    assert "trained with layer_norm_epsilon 1e-05" in message


def test_models_that_the_package_does_not_have(tiny, tmp_path):
    oblong = tiny.tree(tiny.sizes_with(patches=Patches((2, 4))))
    with pytest.raises(layout.CheckpointError, match="patches of 2x4 pixels; mlp-mix"):
        pytorch.save_pytorch(tmp_path / "a.safetensors", oblong, NAME, About())
    changed = tiny.tree()
    changed["MixerBlock_0"]["gamma"] = np.ones(12, np.float32)
    with pytest.raises(layout.CheckpointError, match="MixerBlock_0/gamma: unknown"):
        pytorch.save_pytorch(tmp_path / "a.safetensors", changed, NAME, About())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"3.1.norm.bias": None},
            r"not a Mixer of mlp-mixer-pytorch:\n  3.1.norm.bias",
        ),
        ({"9.weight": np.zeros(3, "f4")}, r"\n  9.weight: unknown"),
        ({"1.weight": np.zeros((24, 190), "f4")}, "1.weight .*190 values of a patch"),
        (
            {"2.0.fn.0.weight": np.zeros((96, 24), "f4")},
            "fn.0.weight has the shape",
        ),
        ({"1.weight": np.zeros((24, 192), "i4")}, "1.weight is I32, expected F32"),
        ({"1.weight": np.zeros((1,) * 9, "f4")}, "1.weight has 9 axes"),
    ],
)
def test_files_that_are_no_mixer_of_the_package(path, tmp_path, change, message):
    tensors = load_file(path) | change
    broken = tmp_path / "a.safetensors"
    save_file({k: x for k, x in tensors.items() if x is not None}, broken)
    with pytest.raises(layout.CheckpointError, match=message) as error:
        layout.infer_model(pytorch.read_pytorch(broken))
    assert str(error.value).startswith(str(broken))
