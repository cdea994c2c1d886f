import json
import logging

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.files import FileError
from mixer_jax.variants import get_variant
from mixer_jax.weights import huggingface, layout
from mixer_jax.weights.layout import CheckpointError
from mixer_jax.weights.mlp_mixer_pytorch import MLP_MIXER_PYTORCH
from mixer_jax.weights.pytorch import read_pytorch
from mixer_jax.weights.reading import open_weights, read_weights
from mixer_jax.weights.state_dict import read_header, read_params, save_state_dict
from mixer_jax.weights.timm import TIMM

MODEL = "model.safetensors"
TORCHVISION = EvalTransform(
    (64, 64), "torchvision", (73, 73), interpolation="pil_bicubic"
)


@pytest.fixture(scope="module")
def small(tiny):
    """Parameters with the patches, blocks and channels of S/32, and few others."""
    variant = vars(get_variant("S/32")) | {"tokens_mlp_dim": 7, "channels_mlp_dim": 9}
    return tiny.tree(tiny.sizes_with(**variant, num_tokens=4, num_classes=3))


@pytest.fixture
def write(tiny, tmp_path):
    """Writes a folder as timm does, of a tiny Mixer, with changes in its config."""

    def write(changes=(), **pretrained):
        config = {
            "architecture": "mixer_s32_224",
            "num_classes": 5,
            "model_args": {"img_size": [16, 16]},
            "pretrained_cfg": {"crop_pct": 0.875, "num_classes": 5, **pretrained},
        }
        config |= dict(changes)
        (tmp_path / "config.json").write_text(json.dumps(config))
        save_state_dict(tmp_path / MODEL, tiny.tree(), TIMM, {})
        return tmp_path

    return write


def written(folder, params, fields=(), transform=TORCHVISION, **options):
    fields = {"gelu": "erf", "layer_norm_epsilon": 1e-6} | dict(fields)
    huggingface.save_folder(folder, params, fields, transform, **options)
    return json.loads((folder / "config.json").read_text("utf-8"))


def test_what_timm_writes(write):
    folder = write(mean=[0, 0, 0], std=[1, 1, 1], interpolation="bilinear")
    assert huggingface.is_folder(folder)
    fields, transform, class_names = huggingface.read_folder_config(folder)
    assert fields == {"gelu": "erf", "layer_norm_epsilon": 1e-6}
    assert transform == EvalTransform(
        (16, 16),
        "torchvision",
        (18, 18),
        interpolation="pil_bilinear",
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    assert class_names is None


def test_what_a_config_leaves_out_is_as_in_timm(write):
    """The defaults of timm's PretrainedCfg, which are no Mixer's."""
    transform = huggingface.read_folder_config(write()).transform
    assert transform.mean == (0.485, 0.456, 0.406)
    assert transform.std == (0.229, 0.224, 0.225)
    assert transform.interpolation == "pil_bicubic"


def test_older_configs_have_no_table(write):
    """There all keys are beside "architecture"."""
    flat = {"mean": [0.1, 0.2, 0.3], "crop_mode": "squash", "pretrained_cfg": None}
    transform = huggingface.read_folder_config(write(flat)).transform
    assert transform.mean == (0.1, 0.2, 0.3)
    assert transform.evaluation == "squash"


def test_size_of_images_without_img_size(write):
    folder = write({"model_args": {}}, input_size=[3, 16, 16])
    assert huggingface.read_folder_config(folder).transform.crop == (16, 16)


def test_tanh_where_a_config_says_so(write):
    folder = write({"model_args": {"img_size": 16, "act_layer": "gelu_tanh"}})
    assert huggingface.read_folder_config(folder).fields["gelu"] == "tanh"


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["a", "b", "c", "d", "e"], ["a", "b", "c", "d", "e"]),
        ({"4": "e", "0": "a", "1": "b", "3": "d", "2": "c"}, ["a", "b", "c", "d", "e"]),
        (["n01440764", "b", "c", "d", "e"], ["tench", "B!", "c", "d", "e"]),
    ],
)
def test_class_names(write, labels, expected):
    names = {"label_names": labels}
    if "n01440764" in labels:
        names["label_descriptions"] = {"b": "B!"}
    found = huggingface.read_folder_config(write(names)).class_names
    assert [name.split(",")[0] for name in found] == expected


def test_tags_say_imagenet(tiny, tmp_path):
    for classes, tag, known in [
        (1000, "goog_in21k_ft_in1k", True),
        (1000, "untrained", False),
        (7, "goog_in21k_ft_in1k", False),
    ]:
        params = tiny.tree(tiny.sizes_with(num_classes=classes))
        save_state_dict(tmp_path / MODEL, params, TIMM, {})
        pretrained = {"tag": tag, "input_size": [3, 16, 16]}
        config = {"architecture": "mixer_b16_224", "num_classes": classes}
        config["pretrained_cfg"] = pretrained
        (tmp_path / "config.json").write_text(json.dumps(config))
        names = huggingface.read_folder_config(tmp_path).class_names
        assert (names is not None and names[0].startswith("tench")) is known


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "vit_small_patch16_224"}, "architecture is vit_small"),
        (
            {"architecture": "gmixer_24_224"},
            r"gmixer_24_224, expected one of mixer",
        ),
        ({"architecture": ["mixer_b16_224"]}, r'architecture is \["mixer_b16_224"\]'),
        ({"num_classes": 7}, r"num_classes is 7, expected 5, as model.safetensors has"),
        ({"num_classes": -1}, "num_classes is -1, expected a number of classes"),
        ({"num_classes": True}, "num_classes is true, expected a number"),
        ({"label_names": ["a", "b"]}, "label_names is a list of 2 names, expected 5"),
        ({"label_names": {"0": "a"}}, "label_names is a list of 1 names, expected 5"),
        ({"label_names": {"x": "a"}}, 'label_names is {"x": "a"}, expected a list'),
        ({"label_names": [1, 2, 3, 4, 5]}, "label_names is .*, expected a list of"),
        ({"label_names": "abcde"}, "label_names is abcde, expected a list of names"),
        ({"label_descriptions": ["a"]}, "label_descriptions is .*, expected a text"),
        ({"label_offset": 1}, "label_offset is 1, expected 0; others are not"),
        ({"mean": [0.5, 0.5]}, r"mean is \[0.5, 0.5\], expected three numbers"),
        ({"mean": [123.7, 116.3, 103.5]}, "mean is .*, expected three numbers from 0"),
        ({"mean": "0.5"}, "mean is 0.5, expected three numbers"),
        ({"mean": [float("nan")] * 3}, "mean is .*NaN.*, expected three numbers"),
        ({"std": [1, 0, 1]}, "std is .*, expected three numbers above 0"),
        ({"std": [1e999] * 3}, "std is .*Infinity.*, expected three numbers above 0"),
        ({"crop_pct": 1e-9}, "crop_pct is 1e-09, expected a share"),
        ({"crop_pct": True}, "crop_pct is true, expected a share"),
        (
            {"crop_mode": "border"},
            "crop_mode is border, expected one of center",
        ),
        ({"interpolation": "lanczos"}, "interpolation is lanczos, expected one of"),
        ({"model_args": {}}, r"input_size is for 224x224 pixels, expected 16 patches"),
        ({"model_args": {"img_size": [16, 32]}}, r"is for 16x32 pixels, expected 16 p"),
        ({"model_args": {"img_size": 2**70}}, r"img_size is 118.*, expected \[height"),
        (
            {"model_args": {"in_chans": 1}},
            "model_args.in_chans is 1, expected 3; ",
        ),
        ({"model_args": {"global_pool": ""}}, 'global_pool is , expected "avg"; other'),
        ({"model_args": {"stem_norm": True}}, "stem_norm is true, expected false; ot"),
        ({"model_args": {"act_layer": "relu"}}, "act_layer is relu, expected one of"),
        (
            {"model_args": {"norm_layer": "x"}},
            "model_args.norm_layer is x, expected",
        ),
        ({"model_args": [1]}, r"model_args is \[1\], expected a table of keys"),
        ({"pretrained_cfg": "x"}, "pretrained_cfg is x, expected a table of keys"),
        ({"layer_norm_epsilon": -1}, "layer_norm_epsilon is -1, expected a number"),
    ],
)
def test_hostile_configs_are_one_message(write, changes, message):
    folder = write(changes)
    with pytest.raises(CheckpointError, match=message) as error:
        huggingface.read_folder_config(folder)
    assert str(folder / "config.json") in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text", [b"", b"{", b"[1]", b"\xff\xfe\xfa", b"[" * 100_000, b"1" * 10_000, b"null"]
)
def test_files_that_are_no_config(write, text):
    folder = write()
    (folder / "config.json").write_bytes(text)
    with pytest.raises(CheckpointError, match=r"config\.json.*( JSON|table of keys)"):
        huggingface.read_folder_config(folder)


def test_arguments_of_training_alone_change_nothing(write):
    args = {"img_size": 16, "drop_rate": 0.1, "mlp_ratio": [0.5, 4], "nlhb": True}
    folder = write({"model_args": args | {"drop_path_rate": None}})
    assert huggingface.read_folder_config(folder).transform.crop == (16, 16)


def test_parameters_of_mlp_mixer_pytorch(tiny, tmp_path):
    """Beside a config.json of no package in particular."""
    save_state_dict(tmp_path / MODEL, tiny.tree(), MLP_MIXER_PYTORCH, {})
    (tmp_path / "config.json").write_text('{"image_size": 16, "patch_size": 4}')
    fields, transform, class_names = huggingface.read_folder_config(tmp_path)
    assert fields == {"gelu": "erf", "layer_norm_epsilon": 1e-5}
    assert (transform, class_names) == (None, None)
    (tmp_path / "config.json").write_text('{"architecture": "mixer_b16_224"}')
    with pytest.raises(CheckpointError, match=r"no Mixer.*blocks\.0\.mlp_tokens"):
        huggingface.read_folder_config(tmp_path)


def test_missing_files(write):
    folder = write()
    (folder / MODEL).unlink()
    assert not huggingface.is_folder(folder)
    with pytest.raises(FileNotFoundError, match=MODEL):
        huggingface.read_folder_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="config"):
        huggingface.read_folder_config(folder)


@pytest.mark.parametrize("gelu", ["erf", "tanh"])
@pytest.mark.parametrize("epsilon", [1e-6, 1e-5])
def test_written_and_read_again(small, tmp_path, assert_same, gelu, epsilon, caplog):
    fields = {"gelu": gelu, "layer_norm_epsilon": epsilon}
    folder = tmp_path / "out"
    names = ["a|b", "größe", "c\n"]
    with caplog.at_level(logging.WARNING):
        written(folder, small, fields, class_names=names)
    assert sorted(x.name for x in folder.iterdir()) == [
        *("README.md", "config.json", MODEL)
    ]
    found = huggingface.read_folder_config(folder)
    assert found == (fields, TORCHVISION, names)
    assert_same(read_pytorch(folder / MODEL), small)
    other = {"tanh": "act_layer=timm.layers.GELUTanh"}.get(gelu, "")
    norm = "torch.nn.LayerNorm, eps=1e-05" if epsilon != 1e-6 else ""
    card = (folder / "README.md").read_text("utf-8")
    for text in (other, norm):
        assert text in card
        assert text in caplog.text
    if not (other or norm):
        assert not caplog.messages
        assert "GELUTanh" not in card
        assert "eps=" not in card


def test_config_is_timms(small, tmp_path):
    config = written(tmp_path / "out", small)
    assert config["architecture"] == "mixer_s32_224"
    assert config["num_classes"] == 3
    args = config["model_args"]
    assert args["img_size"] == [64, 64]
    assert [int(512 * x) for x in args["mlp_ratio"]] == [7, 9]  # as timm computes it
    pretrained = config["pretrained_cfg"]
    assert pretrained["crop_mode"] == "center"
    assert int(64 / pretrained["crop_pct"]) == 73
    assert "license" not in pretrained  # it is not known


def test_images_that_timm_makes_otherwise_are_told(small, tmp_path, caplog):
    for evaluation, mode in [
        ("resize", "squash"),
        ("resize_then_central_crop", "squash"),
        ("resize_small_then_central_crop", "center"),
    ]:
        caplog.clear()
        transform = EvalTransform((64, 64), evaluation, (80, 80))
        with caplog.at_level(logging.WARNING):
            config = written(tmp_path / "out", small, transform=transform)
        assert config["pretrained_cfg"]["crop_mode"] == mode
        expected = 64 if evaluation == "resize" else 80
        assert int(64 / config["pretrained_cfg"]["crop_pct"]) == expected
        (message,) = caplog.messages
        assert "timm's images differ slightly" in message
        assert transform.steps in message


def test_card(small, tmp_path):
    facts = {"Trained on": "my|photos <b>", "Line": "a\nb"}
    written(tmp_path / "out", small, facts=facts)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert card.startswith("---\nlibrary_name: timm\n")
    assert "| Trained on | my\\|photos \\<b\\> |" in card
    assert "| Line | a b |" in card
    assert "license" not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "card", "exec")


def test_a_folder_without_a_head(tiny, small, tmp_path, assert_same):
    params = {key: value for key, value in small.items() if key != "head"}
    config = written(tmp_path / "out", params)
    assert config["num_classes"] == config["model_args"]["num_classes"] == 0
    assert huggingface.read_folder_config(tmp_path / "out").class_names is None
    assert_same(read_pytorch(tmp_path / "out" / MODEL), params)


def test_an_earlier_folder_is_replaced_and_no_other(small, tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()  # an empty one will do
    written(folder, small)
    other = layout.unflatten({k: x + 1 for k, x in layout.flatten(small).items()})
    written(folder, other)
    assert load_file(folder / MODEL)["head.bias"][0] == other["head"]["bias"][0]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(FileError, match=r"is not empty.*notes\.txt"):
        written(folder, small)
    (folder / "notes.txt").unlink()
    config = json.loads((folder / "config.json").read_text())
    del config["written_by"]  # so it is another program's, such as timm's
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(FileError, match="is not empty"):
        written(folder, small)
    with pytest.raises(FileError, match="is a file"):
        written(folder / "config.json", small)
    with pytest.raises(FileError, match="is a URL"):
        huggingface.save_folder(
            "gs://a/b", small, {"gelu": "erf", "layer_norm_epsilon": 1e-6}, TORCHVISION
        )
    assert load_file(folder / MODEL)["head.bias"][0] == other["head"]["bias"][0]
    assert [x.name for x in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("existing", [False, True])
def test_whole_or_not_at_all(small, tmp_path, existing):
    folder = tmp_path / "out"
    if existing:
        written(folder, small)
    before = (folder / MODEL).read_bytes() if existing else None
    params = layout.unflatten(
        {k: np.array(x) for k, x in layout.flatten(small).items()}
    )
    params["head"]["bias"][0] = np.nan
    message = rf"^{folder}: not written\. head/bias has 1 NaN"
    with pytest.raises(CheckpointError, match=message):
        written(folder, params)
    assert [x.name for x in tmp_path.iterdir()] == (["out"] if existing else [])
    assert not existing or (folder / MODEL).read_bytes() == before


def test_what_timm_cannot_build_is_refused(tiny, small, tmp_path):
    with pytest.raises(CheckpointError, match=r"MlpMixer\(.*patch_size=\(4, 4\), n"):
        written(tmp_path / "out", tiny.tree())
    permuted = EvalTransform((64, 64), permute=lambda image: image)
    with pytest.raises(CheckpointError, match=r"permuted pixels \(pp\.permute\)"):
        written(tmp_path / "out", small, transform=permuted)
    with pytest.raises(CheckpointError, match="There are 2 names for 3 classes"):
        written(tmp_path / "out", small, class_names=["a", "b"])
    assert not list(tmp_path.iterdir())


def test_folders_in_half_precision(small, tmp_path):
    folder = tmp_path / "out"
    written(folder, small)
    tensors = load_file(folder / MODEL)
    half = {key: x.astype(np.float16) for key, x in tensors.items()}
    save_file(half, folder / MODEL)
    assert huggingface.read_folder_config(folder).transform == TORCHVISION
    params = read_params(folder / MODEL, read_header(folder / MODEL, [TIMM]))
    assert params["head"]["bias"].dtype == np.float32


def test_the_file_stands_for_its_folder(write, tmp_path):
    """If config.json is timm's; another one says nothing of it."""
    folder = write({"label_names": list("abcde")}, mean=[0, 0, 0], std=[1, 1, 1])
    for found in map(read_weights, (folder, folder / MODEL)):
        assert (found.transform.mean, found.transform.std) == ((0,) * 3, (1,) * 3)
        assert found.transform.evaluation == "torchvision"
        assert found.class_names == list("abcde")
    (folder / "other.safetensors").symlink_to(folder / MODEL)
    assert open_weights(folder / "other.safetensors").about.transform == {}
    for text in ('{"license": "mit"}', "[]", "{"):
        (folder / "config.json").write_text(text)
        assert open_weights(folder / MODEL).about.transform == {}


def test_the_file_alone_says_what_its_folder_said(small, tmp_path):
    fields = {"gelu": "tanh", "layer_norm_epsilon": 1e-5}
    written(tmp_path / "out", small, fields, class_names=["a", "b", "c"])
    (tmp_path / "out" / MODEL).rename(tmp_path / "a.safetensors")
    found = read_weights(tmp_path / "a.safetensors")
    assert found.fields == fields
    assert found.transform == TORCHVISION
    assert found.class_names == ["a", "b", "c"]
