import dataclasses
import json

import numpy as np
import pytest

from mixer_jax.data.imagenet import imagenet_names, imagenet_synsets
from mixer_jax.data.permute import PERMUTE_SEED, permute_patches
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.run.loading import load_model
from mixer_jax.weights import layout, npz, timm
from mixer_jax.weights.layout import CheckpointError
from mixer_jax.weights.published import PUBLISHED

RUN = {
    "model": {
        "model_name": "tiny",
        "patches": {"size": [4, 4]},
        "num_blocks": 2,
        "hidden_dim": 12,
        "tokens_mlp_dim": 6,
        "channels_mlp_dim": 20,
        "dtype": "bfloat16",
        "gelu": "erf",
    },
    "pp": {
        "crop": 16,
        "evaluation": "resize_then_central_crop",
        "resize": 20,
        "transfer": "float32",
    },
    "dataset": "digits",
    "pretrained_dir": "",
    "optimizer": "adam",
    "total_steps": 20,
    "batch": 8,
}


def zeros(sizes):
    shapes = sizes.shapes()
    return layout.unflatten({k: np.zeros(s, "float32") for k, s in shapes.items()})


@pytest.fixture
def workdir(loaded, tmp_path):
    folder = tmp_path / "run"
    npz.save_checkpoint(folder / "final.npz", loaded.params)
    (folder / "config.json").write_text(json.dumps(RUN))
    (folder / "class_names.json").write_text(json.dumps(loaded.class_names))
    return folder


def test_a_run_brings_its_model_transform_and_names(loaded, workdir):
    found = load_model(workdir)
    fields = {"model_name": "tiny", "dtype": "bfloat16", "gelu": "erf"}
    assert found.model == loaded.model.clone(**fields)
    assert found.transform == EvalTransform(
        16, "resize_then_central_crop", 20, "float32"
    )
    assert found.class_names == loaded.class_names
    assert found.config == RUN
    assert load_model(workdir, gelu="tanh").model.gelu == "tanh"


def test_what_a_run_leaves_open_or_adds(workdir):
    config = json.loads(json.dumps(RUN))
    config["model"] |= {"dtype": None, "remat": "blocks", "scan_blocks": True}
    config["pp"] |= {"permute": "patches", "evaluation": "resize", "transfer": "uint8"}
    (workdir / "config.json").write_text(json.dumps(config))
    found = load_model(workdir)
    assert (found.model.dtype, found.model.scan_blocks) == ("float32", False)
    image = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    permuted = permute_patches(image, (4, 4), PERMUTE_SEED)
    np.testing.assert_array_equal(found.transform(image), permuted)


def test_files_bring_what_they_can(loaded, tmp_path):
    npz.save_checkpoint(tmp_path / "a.npz", loaded.params)
    found = load_model(tmp_path / "a.npz")
    transform = EvalTransform(16, resize=18)  # 256/224 of it, for a central crop
    assert (found.model, found.transform) == (loaded.model, transform)
    assert (found.class_names, found.config) == (None, None)
    for gelu in ("tanh", "erf"):  # timm's files say which
        timm.save_timm(tmp_path / "a.safetensors", loaded.params, gelu)
        assert load_model(tmp_path / "a.safetensors").model.gelu == gelu


def test_class_names_from_a_file(loaded, tmp_path):
    npz.save_checkpoint(tmp_path / "a.npz", loaded.params)
    (tmp_path / "a.txt").write_text("\n".join(loaded.class_names) + "\n")
    (tmp_path / "a.json").write_text(json.dumps(loaded.class_names))
    for name in ("a.txt", "a.json"):
        found = load_model(tmp_path / "a.npz", class_names=str(tmp_path / name))
        assert found.class_names == loaded.class_names
    with pytest.raises(
        CheckpointError, match="has 7 classes, but imagenet1k names 1000"
    ):
        load_model(tmp_path / "a.npz", class_names="imagenet1k")
    (tmp_path / "a.json").write_text("[")
    with pytest.raises(CheckpointError, match=r"a\.json is no JSON file"):
        load_model(tmp_path / "a.npz", class_names=str(tmp_path / "a.json"))


@pytest.mark.parametrize("num_classes", [1000, 21843])
def test_a_published_name_brings_imagenet(loaded, tmp_path, monkeypatch, num_classes):
    """With a file of a small model's shapes standing in for the published one."""
    sizes = dataclasses.replace(
        layout.infer_model(loaded.params), num_classes=num_classes
    )
    params = zeros(sizes)
    path = tmp_path / "gsam" / "Mixer-S_16.npz"
    npz.save_checkpoint(path, params)
    file = dataclasses.replace(
        PUBLISHED["gsam/Mixer-S_16"], num_bytes=path.stat().st_size, sizes=sizes
    )
    monkeypatch.setitem(PUBLISHED, "gsam/Mixer-S_16", file)
    monkeypatch.setenv("MIXER_JAX_CACHE", str(tmp_path))
    for name in ("gsam/Mixer-S_16", "gs://mixer_models/gsam/Mixer-S_16.npz"):
        found = load_model(name)
        assert found.class_names == (imagenet_names() if num_classes == 1000 else None)
        assert found.transform.evaluation == "resize_small_then_central_crop"
        assert found.transform.resize == (256, 256)
    assert load_model(path).class_names is None  # just a file


def test_imagenet_names_are_in_the_order_of_tensorflow_datasets():
    from tensorflow_datasets.datasets.imagenet2012 import imagenet_common

    labels = imagenet_common.label_names_file().read_text().split()
    assert list(imagenet_synsets()) == labels == sorted(labels)
    names = imagenet_names()
    assert len(set(names)) == 1000
    assert [names[i] for i in (1, 207)] == [
        "goldfish, Carassius auratus",
        "golden retriever",
    ]
    assert (names[134], names[517]) == ("crane (bird)", "crane (machine)")


def test_what_is_no_model(workdir, tmp_path, loaded):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"without a config\.json.* In it: -"):
        load_model(tmp_path / "empty")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_model(tmp_path / "none.npz")
    (workdir / "final.npz").unlink()
    with pytest.raises(FileNotFoundError, match=r"neither final\.npz nor a checkpoint"):
        load_model(workdir)
    sizes = dataclasses.replace(layout.infer_model(loaded.params), num_tokens=15)
    npz.save_checkpoint(tmp_path / "a.npz", zeros(sizes))
    with pytest.raises(CheckpointError, match=r"15 tokens .* make no square image"):
        load_model(tmp_path / "a.npz")
    (workdir / "class_names.json").unlink()
    with pytest.raises(CheckpointError, match=r"without a class_names\.json"):
        load_model(workdir)


def rewrite(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_the_model_is_what_config_json_says(workdir):
    """Not what the arrays would make one think."""
    config = workdir / "config.json"
    rewrite(config, lambda x: x["model"].update(gate=0.5))
    with pytest.raises(
        CheckpointError, match=r"config.json: .* gate \(MlpMixer has no"
    ):
        load_model(workdir)
    rewrite(config, lambda x: (x["model"].pop("gate"), x["model"].pop("num_blocks")))
    with pytest.raises(
        CheckpointError, match=r"config.json: .* num_blocks \(missing\)"
    ):
        load_model(workdir)
    rewrite(config, lambda x: x["model"].update(num_blocks=1))
    with pytest.raises(CheckpointError, match="does not fit its config") as error:
        load_model(workdir)
    assert "MixerBlock_1/LayerNorm_0/bias: found (12,), expected no such key" in str(
        error.value
    )
    rewrite(
        config, lambda x: (x["model"].update(num_blocks=2), x["pp"].update(crop=18))
    )
    with pytest.raises(
        CheckpointError, match="18x18 pixels cannot be cut into patches"
    ):
        load_model(workdir)
    rewrite(config, lambda x: x["pp"].update(crop=16))
    rewrite(workdir / "class_names.json", lambda x: x.append("hen"))
    with pytest.raises(
        CheckpointError, match=r"head/bias: found \(7,\), expected \(8,\)"
    ):
        load_model(workdir)
