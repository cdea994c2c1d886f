import dataclasses
import json

import pytest

from mixer_jax.run.card import card_facts

CONFIG = {
    "dataset": "digits",
    "pretrained_dir": None,
    "init_from": None,
    "model": {"model_name": "digits"},
    "optimizer": "adam",
    "total_steps": 1200,
    "batch": 64,
    "base_lr": 0.003,
    "weight_decay": 0.0,
}
FINGERPRINT = {"splits": {"train": {"count": 1433}, "test": {"count": 364}}}


@pytest.fixture
def run(loaded):
    """A run's model; keyword arguments change its config."""
    return lambda **changes: dataclasses.replace(
        loaded, config=CONFIG | changes, fingerprint=FINGERPRINT
    )


def test_what_a_run_recorded(run, tmp_path):
    rows = [
        {"step": 600, "test/top1": 0.5, "test/count": 364.0},
        {"step": 1200, "test/top1": 0.96154, "test/loss": 0.125, "test/count": 364.0},
        {"step": 1200, "train/loss": 0.1},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(text)
    assert card_facts(run(), tmp_path) == {
        "Trained on": "digits",
        "Started from": "random parameters",
        "Training": "1,200 steps of 64 images with adam, base_lr 0.003",
        "Images": "train 1,433, test 364",
        "After 1,200 steps": "test/top1 0.9615, test/loss 0.125, test/count 364",
    }


def test_what_is_not_known_is_left_out(run, tmp_path):
    facts = card_facts(dataclasses.replace(run(), fingerprint=None), tmp_path)
    assert list(facts) == ["Trained on", "Started from", "Training"]


def test_no_folders_of_this_machine_and_no_secrets(run, tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "Mixer-B_16.npz").touch()
    pretrained = {"model": {"model_name": "Mixer-B_16"}}
    for changes, key, expected in [
        ({"dataset": str(tmp_path / "photos")}, "Trained on", "photos"),
        ({"init_from": str(tmp_path / "photos")}, "Started from", "photos"),
        (
            pretrained | {"pretrained_dir": "imagenet21k"},
            "Started from",
            "imagenet21k/Mixer-B_16",
        ),
        (
            pretrained | {"pretrained_dir": str(tmp_path / "photos")},
            "Started from",
            "Mixer-B_16",
        ),
        (
            pretrained | {"pretrained_dir": str(tmp_path / "moved")},
            "Started from",
            "moved",  # nobody knows any more which file it was
        ),
        (
            pretrained | {"pretrained_dir": str(tmp_path / "moved" / "a.safetensors")},
            "Started from",
            "a.safetensors",
        ),
        (
            pretrained | {"pretrained_dir": "https://me:secret@example.org/a"},
            "Started from",
            "https://example.org/a/Mixer-B_16",
        ),
    ]:
        assert card_facts(run(**changes), tmp_path)[key] == expected


def test_a_bare_file(loaded, tmp_path):
    (tmp_path / "a.npz").touch()
    facts = card_facts(loaded, tmp_path / "a.npz")
    assert facts == {"Parameters from": "a.npz"}
    facts = card_facts(loaded, "timm/mixer_b16_224.miil_in21k")
    assert facts == {"Parameters from": "timm/mixer_b16_224.miil_in21k"}
