import json
import logging
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import mixer_jax
from mixer_jax.model import MlpBlock
from mixer_jax.weights import layout, npz, pytorch, timm
from mixer_jax.weights.reading import open_weights


@pytest.fixture
def path(golden):
    return golden.path / "timm_mixer.safetensors"


def test_logits_with_the_gelu_of_timm(golden, path):
    expected = golden.load("timm_mixer_expected.npz")
    params = pytorch.read_pytorch(path)
    logits = {}
    for gelu in ("tanh", open_weights(path).about.fields["gelu"]):
        model = layout.infer_model(params).create_model(gelu=gelu)
        logits[gelu], state = model.apply(
            {"params": params},
            expected["images"],
            train=False,
            mutable=["intermediates"],
        )
        pre_logits = state["intermediates"]["pre_logits"][0]
    np.testing.assert_allclose(logits["erf"], expected["logits"], atol=1e-5, rtol=0)
    np.testing.assert_allclose(pre_logits, expected["pre_logits"], atol=1e-5, rtol=0)
    # The data tell the two apart, or the check above would say nothing.
    assert np.abs(logits["tanh"] - expected["logits"]).max() > 3e-5


def test_export_of_an_import_is_the_same_file_byte_for_byte(path, tmp_path):
    params = jax.tree.map(jnp.asarray, pytorch.read_pytorch(path))
    timm.save_timm(tmp_path / "out.safetensors", params, gelu="erf")
    found, expected = load_file(tmp_path / "out.safetensors"), load_file(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].shape == array.shape, name
        assert found[name].dtype == array.dtype, name
        assert found[name].tobytes() == array.tobytes(), name


def test_import_of_an_export_is_exact(tiny, tmp_path, assert_same):
    timm.save_timm(tmp_path / "a.safetensors", tiny.tree())
    assert_same(pytorch.read_pytorch(tmp_path / "a.safetensors"), tiny.tree())


def test_timm_to_npz_and_back(path, tmp_path, assert_same):
    npz.save_checkpoint(tmp_path / "a.npz", pytorch.read_pytorch(path))
    assert_same(npz.read_checkpoint(tmp_path / "a.npz"), pytorch.read_pytorch(path))


def test_export_says_that_timm_computes_erf(tiny, tmp_path, caplog):
    path = tmp_path / "a.safetensors"
    with caplog.at_level(logging.WARNING, logger="mixer_jax"):
        timm.save_timm(path, tiny.tree(), metadata={"model": "tiny"})
    assert "timm computes the exact erf GELU" in caplog.text
    assert "trained with tanh" in caplog.text
    content = path.read_bytes()
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    metadata = header["__metadata__"]
    assert "timm computes the exact erf GELU" in metadata["note"]
    assert (metadata["format"], metadata["model"]) == ("pt", "tiny")
    # So that it comes back as it was.
    assert open_weights(path).about.fields["gelu"] == "tanh"


def test_export_is_as_readable_as_any_other_file(tiny, tmp_path):
    timm.save_timm(tmp_path / "a.safetensors", tiny.tree())
    (tmp_path / "plain").touch()
    mode = lambda name: (tmp_path / name).stat().st_mode
    assert mode("a.safetensors") == mode("plain")


def test_failed_export_leaves_nothing(tiny, tmp_path):
    params = tiny.tree()
    params["head"]["bias"][0] = np.nan
    with pytest.raises(ValueError, match="head/bias has 1 NaN"):
        timm.save_timm(tmp_path / "a.safetensors", params)
    with pytest.raises(ValueError, match="gelu is 'relu', expected tanh or erf"):
        timm.save_timm(tmp_path / "a.safetensors", tiny.tree(), gelu="relu")
    del params["stem"]["bias"]
    with pytest.raises(ValueError, match="stem/bias: missing"):
        timm.save_timm(tmp_path / "a.safetensors", params)
    params = tiny.tree()
    params["MixerBlock_1"]["gamma"] = np.ones(12, np.float32)  # of a changed model
    with pytest.raises(
        ValueError, match=r"published .*\n  MixerBlock_1/gamma: unknown"
    ):
        timm.save_timm(tmp_path / "a.safetensors", params)
    assert list(tmp_path.iterdir()) == []


def test_export_of_erf_parameters_needs_no_warning(tiny, tmp_path, caplog):
    timm.save_timm(tmp_path / "a.safetensors", tiny.tree(), gelu="erf")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blocks.1.norm1.bias": None}, "blocks.1.norm1.bias: missing"),
        ({"blocks.0.attn.qkv.weight": 3}, "blocks.0.attn.qkv.weight: unknown"),
        ({"norm.bias": "float64"}, "norm.bias is F64, expected F32"),
        ({"norm.bias": np.nan}, "norm.bias has 24 NaN"),
        (
            {"blocks.2.mlp_tokens.fc1.weight": 3},
            r"MixerBlock_2/token_mixing/Dense_0/kernel: found \(3,\), .* \(16, 12\)",
        ),
    ],
)
def test_files_that_are_no_timm_mixer(path, tmp_path, change, message):
    tensors = load_file(path)
    [(name, value)] = change.items()
    if value is None:
        del tensors[name]
    elif value == "float64":
        tensors[name] = tensors[name].astype("float64")
    elif value == 3:
        tensors[name] = np.zeros(3, "float32")
    else:
        tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=message) as error:
        mixer_jax.load_checkpoint(tmp_path / "a.safetensors")
    assert str(tmp_path) in str(error.value)


def test_files_that_are_no_safetensors(path, tmp_path):
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        pytorch.read_pytorch(cut)
    cut.write_bytes(b"")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        pytorch.read_pytorch(cut)
    with pytest.raises(IsADirectoryError, match="is a folder"):
        pytorch.read_pytorch(tmp_path)
    with pytest.raises(FileNotFoundError, match="no such file"):
        pytorch.read_pytorch(tmp_path / "none.safetensors")


def test_gelu_field():
    x = jnp.linspace(-3, 3, 13)[None]
    params = MlpBlock(13).init(jax.random.key(0), x)
    tanh, erf = (MlpBlock(13, gelu=gelu).apply(params, x) for gelu in ("tanh", "erf"))
    assert (MlpBlock(13).apply(params, x) == tanh).all()
    assert 0 < jnp.abs(tanh - erf).max() < 5e-3
    with pytest.raises(ValueError, match="gelu is 'quick', expected tanh or erf"):
        MlpBlock(13, gelu="quick").apply(params, x)


def rewrapped(path, rename):
    """Writes the arrays of a safetensors file under other names."""
    save_file({rename(key): x for key, x in load_file(path).items()}, path)


@pytest.mark.parametrize(
    "rename",
    [
        lambda key: f"module.{key}",
        lambda key: f"_orig_mod.{key}",
        lambda key: f"module._orig_mod.{key}",
        lambda key: f"_orig_mod.module.{key}",
        lambda key: f"model.{key}",
        lambda key: f"model.module.{key}",
        lambda key: re.sub(r"(blocks.\d+)", r"\1._orig_mod", key),
    ],
)
def test_names_of_wrappers_are_left_out(tiny, tmp_path, assert_same, caplog, rename):
    path = tmp_path / "a.safetensors"
    timm.save_timm(path, tiny.tree(), "erf")
    rewrapped(path, rename)
    with caplog.at_level(logging.WARNING, logger="mixer_jax"):
        assert_same(pytorch.read_pytorch(path), tiny.tree())
    (message,) = caplog.messages
    assert "left out what PyTorch's wrappers put into" in message


def test_two_names_that_differ_in_a_wrapper_alone_are_never_one(tiny, tmp_path):
    path = tmp_path / "a.safetensors"
    timm.save_timm(path, tiny.tree(), "erf")
    arrays = load_file(path)
    save_file(arrays | {"module.norm.bias": arrays["norm.bias"]}, path)
    with pytest.raises(layout.CheckpointError, match=r"module\.norm\.bias: unknown"):
        pytorch.read_pytorch(path)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["cls_token", "blocks.0.attn.qkv.weight"], "a Vision Transformer of PyTorch"),
        (["conv1.weight", "layer1.0.conv1.weight"], "a ResNet of PyTorch"),
        (["module.conv1.weight", "module.layer1.0.bn1.bias"], "a ResNet of PyTorch"),
    ],
)
def test_another_architecture_is_one_line(tmp_path, keys, message):
    path = tmp_path / "a.safetensors"
    save_file(dict.fromkeys(keys, np.zeros(3, np.float32)), path)
    with pytest.raises(
        layout.CheckpointError, match=f"no Mixer.*looks like {message}"
    ) as e:
        pytorch.read_pytorch(path)
    assert "\n" not in str(e.value)
