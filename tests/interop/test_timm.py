"""Against timm itself: its models, its transforms, its folders, both ways."""

import functools

import jax
import numpy as np
import pytest

import mixer_jax
from mixer_jax.data.preprocess import EvalTransform, scale
from mixer_jax.run.loading import load_model
from mixer_jax.weights import huggingface
from mixer_jax.weights.timm_config import transform_of

torch = pytest.importorskip("torch")
timm = pytest.importorskip("timm")

NAMES = [f"class {i}" for i in range(7)]
FIELDS = ("gelu", "layer_norm_epsilon")
# name, dtype, what its config.json says beside that
MODELS = {
    "B/16": ("mixer_b16_224", torch.float32, {}),
    "S/32 in bfloat16": ("mixer_s32_224", torch.bfloat16, {}),
    "mean 0, std 1": (
        "mixer_s32_224",
        torch.float32,
        {"mean": [0.0] * 3, "std": [1.0] * 3, "interpolation": "bilinear"},
    ),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, randomize, tmp_path_factory):
    """A model of timm, and the folder that timm saved it in."""
    name, dtype, config = MODELS[request.param]
    folder = tmp_path_factory.mktemp("timm")
    model = timm.create_model(name, num_classes=7)
    model.pretrained_cfg |= config
    randomize(model).to(dtype)
    timm.models.save_for_hf(
        model,
        str(folder),
        model_config={"label_names": NAMES},
        safe_serialization=True,
    )
    return model.float(), Ours(folder)


class Ours:
    """The model in a folder, as it is here."""

    def __init__(self, folder):
        loaded = load_model(folder)
        self.transform, self.names = loaded.transform, loaded.class_names
        self.params, self.model = loaded.params, loaded.model
        self.fields = {x: getattr(self.model, x) for x in FIELDS}

    def __call__(self, images):
        """Returns logits for images that timm's transform made, [n, 3, h, w]."""
        return self.apply(np.moveaxis(images, 1, -1))

    @functools.cached_property
    def apply(self):
        forward = jax.jit(functools.partial(self.model.apply, train=False))
        return lambda images: np.asarray(forward({"params": self.params}, images))


def logits_of(model, images):
    with torch.no_grad():
        return model(torch.from_numpy(images)).numpy()


def cut_by_timm(model, photographs):
    config = timm.data.resolve_model_data_config(model)
    transform = timm.data.create_transform(**config)
    return np.stack([transform(image).numpy() for image in photographs])


def report(what, found, expected):
    difference = np.abs(found - expected).max()
    print(
        f"\n  {what}: at most {difference:.2g} apart, of {np.abs(expected).max():.2g}"
    )
    return difference


def test_logits_of_ten_photographs(saved, photographs):
    model, ours = saved
    theirs = cut_by_timm(model, photographs)
    expected = logits_of(model, theirs)
    assert np.ptp(expected, axis=0).min() > 0.01  # the images tell them apart
    assert report("logits, timm's images", ours(theirs), expected) < 1e-4

    transform = ours.transform
    pixels = np.stack([transform(np.asarray(image)) for image in photographs])
    own = scale(pixels, transform.mean, transform.std)
    levels = 255 * (np.moveaxis(theirs, 1, -1) * transform.std + transform.mean)
    assert report("pixels in 0..255", pixels, levels) < 1e-3
    assert report("logits, our images", ours.apply(own), expected) < 1e-4
    assert ours.names == NAMES


def test_back_to_timm(saved, photographs, tmp_path):
    model, ours = saved
    out = tmp_path / "out"
    huggingface.save_folder(out, ours.params, ours.fields, ours.transform, ours.names)
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    for key in ("mean", "std", "interpolation", "crop_pct", "input_size"):
        assert tuple(np.ravel(again.pretrained_cfg[key])) == tuple(
            np.ravel(model.pretrained_cfg[key])
        )
    assert again.pretrained_cfg["label_names"] == NAMES
    images = cut_by_timm(again, photographs)
    assert (images == cut_by_timm(model, photographs)).all()
    assert report("logits", logits_of(again, images), ours(images)) < 1e-4
    assert (logits_of(again, images) == logits_of(model, images)).all()


@pytest.mark.parametrize("crop_mode", ["center", "squash"])
@pytest.mark.parametrize("crop_pct", [0.95, 0.96, 1.0])  # 235 and 233 pixels before
def test_cuts(crop_mode, crop_pct, photographs):
    config = {"crop_mode": crop_mode, "crop_pct": crop_pct}
    config |= {"interpolation": "bicubic", "mean": [0.0] * 3, "std": [1.0] * 3}
    cut = timm.data.create_transform((3, 224, 224), **config)
    ours = transform_of(config | {"input_size": [3, 224, 224]})
    for image in photographs[:3]:
        levels = 255 * np.moveaxis(cut(image).numpy(), 0, -1)
        assert np.abs(ours(np.asarray(image)) - levels).max() < 1e-3


@pytest.mark.parametrize(("gelu", "epsilon"), [("tanh", 1e-6), ("erf", 1e-5)])
def test_what_a_config_cannot_say_is_in_the_card(
    gelu, epsilon, photographs, randomize, tmp_path
):
    """The README.md gives the call that computes the same logits."""
    model = timm.create_model("mixer_s32_224", num_classes=7)
    state = randomize(model).state_dict()
    from safetensors.torch import save_file

    save_file(state, tmp_path / "a.safetensors")
    params = mixer_jax.load_checkpoint(tmp_path / "a.safetensors")
    fields = {"gelu": gelu, "layer_norm_epsilon": epsilon}
    transform = EvalTransform((224, 224), "torchvision", interpolation="pil_bicubic")
    out = tmp_path / "out"
    huggingface.save_folder(out, params, fields, transform)
    ours = Ours(out)
    assert ours.fields == fields
    photographs[0].save(tmp_path / "IMAGE.png")
    code = (out / "README.md").read_text().partition("```python\n")[2]
    code = code.partition("```")[0].replace("local-dir:FOLDER", f"local-dir:{out}")
    code = code.replace("IMAGE", str(tmp_path / "IMAGE.png"))
    variables = {}
    exec(code, variables)
    found = variables["logits"].detach().numpy()
    images = variables["image"][None].numpy()
    assert report(f"logits, {gelu}, {epsilon}", found, ours(images)) < 1e-4
    plain = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    # So the call is needed.
    assert np.abs(logits_of(plain, images) - found).max() > 1e-6


@pytest.mark.parametrize("size", [(224, 224), (320, 224)])
def test_sizes_that_are_not_timms_own(size, photographs, randomize, tmp_path):
    """Token and channel widths, and sizes of images, are arguments in config.json."""
    model = timm.create_model(
        "mixer_s32_224", num_classes=0, img_size=size, mlp_ratio=(0.301, 1.7)
    )
    timm.models.save_for_hf(
        randomize(model), str(tmp_path / "in"), safe_serialization=True
    )
    ours = Ours(tmp_path / "in")
    assert ours.transform.crop == size
    out = tmp_path / "out"
    huggingface.save_folder(out, ours.params, ours.fields, ours.transform)
    again = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    images = cut_by_timm(again, photographs)
    expected = logits_of(model, images)
    assert (logits_of(again, images) == expected).all()
    assert report(f"pre_logits at {size}", ours(images), expected) < 1e-4
    pixels = np.stack([ours.transform(np.asarray(image)) for image in photographs])
    mean, std = ours.transform.mean, ours.transform.std
    levels = 255 * (np.moveaxis(images, 1, -1) * std + mean)
    assert report(f"pixels at {size}", pixels, levels) < 1e-3
