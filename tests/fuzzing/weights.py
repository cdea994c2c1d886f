"""Readers of parameters and of the JSON files of runs."""

import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from configs import digits
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.run.card import card_facts
from mixer_jax.run.config import ConfigError
from mixer_jax.run.loading import load_model
from mixer_jax.run.records import read_run
from mixer_jax.run.source import open_source
from mixer_jax.run.workdir import open_workdir
from mixer_jax.variants import Patches, Variant
from mixer_jax.visualize.runs import read_metrics
from mixer_jax.weights import layout, npz
from mixer_jax.weights.about import About, write_beside
from mixer_jax.weights.class_names import read_class_names
from mixer_jax.weights.layout import CheckpointError
from mixer_jax.weights.pytorch import save_pytorch

from .harness import Reader

TRANSFORM = EvalTransform(4, "torchvision", 5, interpolation="pil_bicubic")
FIELDS = {"model_name": "tiny", "gelu": "erf", "layer_norm_epsilon": 1e-6}
ABOUT = About(FIELDS, TRANSFORM.as_dict(), ["ant", "bee", "cat"])


def _params() -> dict[str, Any]:
    """A Mixer of one block for images of 4x4 pixels, in 20 arrays."""
    variant = Variant(Patches((2, 2)), 1, 4, 3, 5)
    shapes = layout.MixerSizes(variant, num_tokens=4, num_classes=3).shapes()
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(x, "float32") for key, x in shapes.items()}


def _write_npz(folder: pathlib.Path) -> list[pathlib.Path]:
    params = _params()
    older = {}
    for key, array in params.items():
        key = re.sub("^stem", "embedding", key)
        key = re.sub("^MixerBlock_", "Mixer/encoderblock_", key)
        key = re.sub("^pre_head_layer_norm", "Mixer/encoder_norm", key)
        older[key] = array
    paths = [folder / f"{name}.npz" for name in ("stored", "deflated", "older")]
    np.savez(paths[0], allow_pickle=False, **params)
    half = {key: x.astype("float16") for key, x in params.items()}
    np.savez_compressed(paths[1], allow_pickle=False, **half)
    np.savez(paths[2], allow_pickle=False, **older)
    return paths


def _write_beside(folder: pathlib.Path) -> list[pathlib.Path]:
    path = folder / "a.npz"
    npz.save_checkpoint(path, layout.unflatten(_params()))
    write_beside(path, ABOUT)
    return [folder / "a.npz.json"]


def _write_safetensors(folder: pathlib.Path) -> list[pathlib.Path]:
    params = layout.unflatten(_params())
    paths = [folder / "timm.safetensors", folder / "lucidrains.safetensors"]
    for path, package in zip(paths, ("timm", "mlp-mixer-pytorch"), strict=True):
        save_pytorch(path, params, package, ABOUT)
    return paths


def _write_folder(folder: pathlib.Path) -> list[pathlib.Path]:
    config = {
        "architecture": "mixer_s32_224",
        "num_classes": 3,
        "model_args": {"img_size": [4, 4], "act_layer": "gelu_tanh"},
        "pretrained_cfg": {"crop_pct": 0.875, "num_classes": 3, "mean": [0, 0.5, 1]},
        "label_names": ["ant", "bee", "cat"],
        "label_descriptions": {"ant": "an ant"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    save_pytorch(path, layout.unflatten(_params()), "timm", ABOUT)
    return [folder / "config.json", path]


def _write_run(folder: pathlib.Path) -> list[pathlib.Path]:
    """The workdir of a run that is done."""
    config = {
        "model": {
            "model_name": "tiny",
            "patches": {"size": [2, 2]},
            "num_blocks": 1,
            "hidden_dim": 4,
            "tokens_mlp_dim": 3,
            "channels_mlp_dim": 5,
            "dtype": None,
            "gelu": "erf",
        },
        "pp": {
            "crop": 4,
            "evaluation": "resize_then_central_crop",
            "resize": [5, 6],
            "transfer": "float32",
            "permute": "patches",
            "mean": [0.1, 0.2, 0.3],
            "train": "train",
            "test": "test",
        },
        "dataset": "digits",
        "loss": "softmax",
        "optimizer": "adam",
        "total_steps": 20,
        "batch": 8,
        "pretrained_dir": "",
        "base_lr": 0.003,
    }
    digest = {"count": 3, "names": "00"}
    about = {
        "multilabel": False,
        "fingerprint": {"classes": digest, "splits": {"test": digest}},
    }
    files = {"config": config, "class_names": ABOUT.class_names, "dataset": about}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    npz.save_checkpoint(folder / "final.npz", layout.unflatten(_params()))
    _write_metrics(folder)
    return [folder / f"{name}.json" for name in files]


def _write_names(folder: pathlib.Path) -> list[pathlib.Path]:
    (folder / "a.txt").write_text("ant\nbee\ncat \n")
    (folder / "a.json").write_text('["ant", "b\\u00e9", "cat"]')
    return [folder / "a.txt", folder / "a.json"]


def _write_metrics(folder: pathlib.Path) -> list[pathlib.Path]:
    rows = [
        {"step": i, "train/loss": 1 / i, "train/epoch": i / 7, "test/count": 100.0}
        for i in range(1, 6)
    ]
    path = folder / "metrics.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return [path]


def _use(path: pathlib.Path) -> None:
    """Reads parameters and all that is known of them, and makes an image for them."""
    source = open_source(path)
    shapes = source.shapes()
    weights = source.load()
    assert shapes == layout.shapes_of(weights.params)
    layout.infer_sizes(shapes, str(path))
    if weights.transform:
        weights.transform(np.zeros((5, 6, 3), np.uint8))


def _load(workdir: pathlib.Path) -> None:
    """Makes a run's model ready, and a card for it."""
    loaded = load_model(workdir)
    assert loaded.loss_fn
    card_facts(loaded, workdir)


def _continue(workdir: pathlib.Path) -> None:
    """Compares the run with another config, as a second start does."""
    config = digits.get_config()
    with pytest.raises(ConfigError, match="holds a run with another config"):
        open_workdir(config, workdir)


READERS = {
    "npz": Reader(_write_npz, _use, (CheckpointError,)),
    "beside": Reader(
        _write_beside, lambda x: _use(x.with_suffix("")), (CheckpointError,)
    ),
    "safetensors": Reader(_write_safetensors, _use, (CheckpointError,)),
    "folder": Reader(_write_folder, lambda x: _use(x.parent), (CheckpointError,)),
    "run": Reader(
        _write_run,
        lambda x: (_use(x.parent), read_run(x.parent), _continue(x.parent)),
        (CheckpointError,),
    ),
    "run-model": Reader(_write_run, lambda x: _load(x.parent), (CheckpointError,)),
    "class-names": Reader(_write_names, read_class_names, (CheckpointError,)),
    "metrics": Reader(_write_metrics, lambda x: read_metrics(x.parent), (ValueError,)),
}
