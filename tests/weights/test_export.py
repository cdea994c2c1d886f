import importlib.util
import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from mixer_jax.data.permute import create_permute
from mixer_jax.data.preprocess import EvalTransform, scale
from mixer_jax.weights import export

# Runs exported files where mixer_jax cannot be imported.
OUTSIDE = """
import pathlib, sys
import numpy as np

folder = pathlib.Path(sys.argv[1])
images = np.load(folder / "images.npy")
for path in folder.glob("*.onnx"):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    outputs = {str(n): session.run(None, {"images": images[:n]})[0] for n in (1, 16)}
    np.savez(f"{path}.npz", **outputs)
for path in folder.glob("*.stablehlo"):
    from jax import export

    call = export.deserialize(bytearray(path.read_bytes())).call
    np.savez(f"{path}.npz", **{str(n): call(images[:n]) for n in (1, 16)})
assert "mixer_jax" not in sys.modules
"""
HAS_ONNX = importlib.util.find_spec("jax2onnx") is not None
KINDS = {"logits, tanh": ("tanh", False), "features, erf": ("erf", True)}


@pytest.fixture(scope="module")
def params(tiny):
    """Random, at about the scale of trained ones."""
    return jax.tree.map(lambda x: x * np.float32(0.3), tiny.tree())


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (16, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def outside(tiny, params, images, tmp_path_factory):
    """A folder of exported files and, computed by another process, their outputs."""
    folder = tmp_path_factory.mktemp("exported")
    np.save(folder / "images.npy", images)
    for kind, (gelu, features) in KINDS.items():
        model = tiny.sizes.create_model(gelu=gelu)
        args = (model, params, EvalTransform(16))
        export.export_stablehlo(folder / f"{kind}.stablehlo", *args, features=features)
        if HAS_ONNX:
            export.export_onnx(folder / f"{kind}.onnx", *args, features=features)
    command = [sys.executable, "-I", "-c", OUTSIDE, str(folder)]
    subprocess.run(command, check=True, timeout=300)
    return folder


@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ending", ["stablehlo", "onnx"])
def test_exported_file_computes_the_same_elsewhere(
    tiny, params, images, outside, ending, kind, batch
):
    if ending == "onnx" and not HAS_ONNX:
        pytest.skip("the extra onnx is not installed")
    gelu, features = KINDS[kind]
    expected, state = tiny.sizes.create_model(gelu=gelu).apply(
        {"params": params}, scale(images), train=False, mutable=["intermediates"]
    )
    if features:
        expected = state["intermediates"]["pre_logits"][0]
    with np.load(outside / f"{kind}.{ending}.npz") as outputs:
        found = outputs[str(batch)]
    assert np.ptp(expected) > 1  # or a tolerance of 1e-4 would say little
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected[:batch], atol=1e-4, rtol=0)


def test_stablehlo_is_for_three_platforms(tiny, params, tmp_path):
    path = tmp_path / "new folder" / "model.stablehlo"
    export.export_stablehlo(path, tiny.sizes.create_model(), params, EvalTransform(16))
    assert {x.name for x in path.parent.iterdir()} == {path.name, f"{path.name}.json"}
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert set(exported.platforms) == {"cpu", "cuda", "tpu"}
    assert str(exported.in_avals[0].shape[0]) == "n"


def test_description_says_how_to_use_the_file(tiny, params, tmp_path):
    path = tmp_path / "model.stablehlo"
    names = ["ant", "bee", "cat", "dog", "élan"]
    transform = EvalTransform(16, "resize_then_central_crop", resize=20)
    model = tiny.sizes.create_model(gelu="erf")
    export.export_stablehlo(path, model, params, transform, names)
    about = json.loads((tmp_path / "model.stablehlo.json").read_text("utf-8"))
    assert about["format"] == "stablehlo"
    assert about["gelu"] == "erf"
    assert about["class_names"] == names
    assert about["input"]["shape"] == ["n", 16, 16, 3]
    assert about["output"] == {"name": "logits", "dtype": "float32", "shape": ["n", 5]}
    assert about["preprocessing"]["evaluation"] == transform.evaluation
    assert about["preprocessing"]["steps"].startswith("resize to 20x20, crop the cent")
    export.export_stablehlo(path, model, params, transform, names, features=True)
    about = json.loads((tmp_path / "model.stablehlo.json").read_text("utf-8"))
    assert about["output"]["name"] == "pre_logits"
    assert about["output"]["shape"] == ["n", 12]
    assert about["class_names"] is None  # they are not what the numbers stand for


def test_model_of_permuted_images_is_not_exported(tiny, params, tmp_path):
    transform = EvalTransform(16, permute=create_permute("pixels", (4, 4)))
    with pytest.raises(export.ExportError, match=r"permuted its images' pixels"):
        export.export_stablehlo(
            tmp_path / "a", tiny.sizes.create_model(), params, transform
        )
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_when_it_fails(tiny, params, tmp_path, monkeypatch):
    model = tiny.sizes.create_model()
    path = tmp_path / "model.onnx"
    with pytest.raises(
        ValueError,
        match=r"images of 20x20 pixels and 3 ch.*\n.*token_mixing.* expected \(25, 6\)",
    ):
        export.export_stablehlo(path, model, params, EvalTransform(20))
    monkeypatch.setitem(sys.modules, "jax2onnx", None)  # as if not installed
    with pytest.raises(export.ExportError, match=r'pip install "mixer-jax\[onnx\]"'):
        export.export_onnx(path, model, params, EvalTransform(16))
    monkeypatch.setattr(export, "_ONNX_LIMIT_BYTES", 100)
    with pytest.raises(export.ExportError, match="ONNX file at most 100"):
        export.export_onnx(path, model, params, EvalTransform(16))
    assert list(tmp_path.iterdir()) == []
