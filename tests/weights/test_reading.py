"""One way to read whatever holds parameters."""

import json

import numpy as np
import pytest

from mixer_jax.data.imagenet import imagenet_names
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.weights import hub, layout, names, npz, published, pytorch, reading
from mixer_jax.weights.about import About, write_beside
from mixer_jax.weights.reading import find_checkpoint, open_weights, read_weights

ABOUT = About(
    {"gelu": "erf", "layer_norm_epsilon": 1e-5, "model_name": "mine"},
    {"crop": 16, "evaluation": "resize_then_central_crop", "resize": 20, "mean": 0.25},
    ["a", "b", "c", "d", "e"],
)


@pytest.fixture
def kinds(tiny, tmp_path):
    """A file of each kind that can say everything."""
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    write_beside(tmp_path / "a.npz", ABOUT)
    paths = [tmp_path / "a.npz"]
    for package in names.PACKAGES:
        paths.append(tmp_path / f"{package}.safetensors")
        pytorch.save_pytorch(paths[-1], tiny.tree(), package, ABOUT)
    return paths


def test_every_kind_says_the_same(kinds, tiny, assert_same):
    for path in kinds:
        found = read_weights(path)
        assert_same(found.params, tiny.tree())
        assert found.fields == ABOUT.fields
        assert found.transform == EvalTransform(**ABOUT.transform)
        assert found.class_names == ABOUT.class_names
        assert found.where == str(path)


def test_shapes_are_told_without_reading_an_array(kinds, tiny, golden, monkeypatch):
    for read in ("npz.check_values", "npz.read_shapes", "state_dict.read_params"):
        monkeypatch.setattr(f"mixer_jax.weights.{read}", None)
    for path in kinds:
        assert open_weights(path).shapes() == tiny.sizes.shapes()
    older = open_weights(golden.path / "older_layout_checkpoint.npz").shapes()
    assert older == layout.infer_sizes(older, "").shapes()
    name = "mlp_mixer_pytorch.safetensors"  # whose stem has other axes
    lucid = open_weights(golden.path / name).shapes()
    assert lucid == layout.infer_sizes(lucid, "").shapes()


def test_shapes_of_damaged_files(kinds):
    for path in kinds:
        content = path.read_bytes()
        path.write_bytes(content.replace(b"NUMPY", b"numpy"))
        if path.suffix == ".npz":
            with pytest.raises(layout.CheckpointError, match="cannot be read"):
                open_weights(path).shapes()
        path.write_bytes(content[:-100])
        with pytest.raises(layout.CheckpointError, match=r"cut off|no whole"):
            open_weights(path).shapes()


def test_what_is_known_of_a_file_that_says_nothing(tiny, tmp_path):
    npz.save_checkpoint(tmp_path / "a.npz", tiny.tree())
    known = {"a.npz": {}}
    for package, epsilon in zip(names.PACKAGES, (1e-6, 1e-5), strict=True):
        name = f"{package}.safetensors"
        pytorch.save_pytorch(tmp_path / name, tiny.tree(), package, About())
        known[name] = {"gelu": "erf", "layer_norm_epsilon": epsilon}
    for name, fields in known.items():
        found = read_weights(tmp_path / name)
        assert found.fields == fields
        assert found.transform == EvalTransform(16, resize=18)
        assert found.class_names is None


def test_the_size_of_images_that_are_not_square(tiny, tmp_path):
    params = tiny.tree(tiny.sizes_with(num_tokens=15))
    path = tmp_path / "a.npz"
    npz.save_checkpoint(path, params)
    for size in (None, (16, 16), (12, 21)):
        assert read_weights(path, image_size=size).transform is None
    for size in ((12, 20), (20, 12)):
        assert read_weights(path, image_size=size).transform.crop == size
    write_beside(path, About({}, {"crop": (20, 12)}))
    assert read_weights(path).transform.crop == (20, 12)


def test_a_published_name_says_it_all_before_it_is_fetched(monkeypatch):
    monkeypatch.setattr(published, "_fetch", None)
    about = open_weights("imagenet1k/Mixer-B_16").about
    assert about.fields["gelu"] == "tanh"
    assert about.transform["evaluation"] == "resize_small_then_central_crop"
    assert about.class_names == imagenet_names()
    url = "gs://mixer_models/imagenet21k/Mixer-B_16.npz"
    assert open_weights(url).about.class_names is None


def test_a_name_of_the_hub_is_its_folder(kinds, tiny, tmp_path, monkeypatch):
    """Without config.json's of timm, the file says what it can."""
    folder = tmp_path / "folder"
    folder.mkdir()
    kinds[1].rename(folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"license": "mit"}))
    monkeypatch.setattr(hub, "resolve_hub", lambda text: folder)
    for name in ("someone/mixer", folder):
        found = read_weights(name)
        assert found.fields == ABOUT.fields
        assert found.class_names == ABOUT.class_names
        np.testing.assert_array_equal(
            found.params["stem"]["bias"], tiny.flat()["stem/bias"]
        )


def test_a_folder_without_its_files(tmp_path):
    with pytest.raises(
        IsADirectoryError, match=r"without config\.json and model\.safe"
    ):
        open_weights(tmp_path)


def test_the_order_in_which_names_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = ["mine/B.npz", "mine/C.safetensors", "one.safetensors", "run/config.json"]
    local += ["imagenet21k/Mixer-B_16.npz", "timm/mixer/B.npz", "run/final.npz"]
    for name in local:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    b16 = "gs://mixer_models/imagenet21k/Mixer-B_16.npz"
    for given, model_name, expected in (
        ("imagenet21k", "B/16", b16),
        ("imagenet21k/", "Mixer-B_16", b16),
        ("gs://mixer_models/imagenet21k", "Mixer-B_16", b16),
        ("imagenet21k/Mixer-B_16", "other", "imagenet21k/Mixer-B_16"),
        ("./imagenet21k", "B/16", "imagenet21k/Mixer-B_16.npz"),
        ("https://host/a.npz?key=1", "B", "https://host/a.npz?key=1"),
        ("https://host/a.safetensors", "B", "https://host/a.safetensors"),
        ("https://host/folder/", "B", "https://host/folder/B.npz"),
        ("one.safetensors", "B", "one.safetensors"),
        ("mine/none.npz", "B", "mine/none.npz"),  # which is not there
        ("mine", "B", "mine/B.npz"),
        (tmp_path / "mine", "C", str(tmp_path / "mine" / "C.safetensors")),
        ("mine", "Mixer-B_16", "mine/Mixer-B_16.npz"),  # which is not there
        ("run", "Mixer-B_16", "run"),
        ("run", "final", "run/final.npz"),
        ("timm/mixer", "B", "timm/mixer/B.npz"),
        ("someone/mixer", "B", "someone/mixer"),
        ("someone/mixer@v1", "B", "someone/mixer@v1"),
    ):
        assert find_checkpoint(given, model_name) == expected, given
    assert reading.SUFFIXES == (".npz", ".safetensors")
