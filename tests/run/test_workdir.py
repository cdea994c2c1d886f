"""Which workdirs a run goes on in, and which it refuses."""

import json
import os

import pytest

from mixer_jax.run import trainer
from mixer_jax.run import workdir as workdirs

from .test_trainer import assert_bit_equal, final_params, killed_at, tiny_config


def test_a_workdir_that_is_not_in_utf8_is_refused(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    with pytest.raises(
        trainer.ConfigError, match=r"caf\\xe9: its name is not in UTF-8"
    ):
        workdirs.open_workdir(tiny_config(), tmp_path / name)
    assert not (tmp_path / name).exists()


def test_what_a_save_left_that_was_cut_off_is_no_result(tmp_path):
    trainer.train_and_evaluate(tiny_config(total_steps=3), tmp_path)
    (tmp_path / "final.npz").unlink()
    (tmp_path / "checkpoints" / "3").rename(
        tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp"
    )
    config = tiny_config(total_steps=3, base_lr=0.5)
    trainer.train_and_evaluate(config, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["base_lr"] == 0.5
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_a_whole_checkpoint_is_a_result(tmp_path):
    with killed_at(4):
        trainer.train_and_evaluate(tiny_config(), tmp_path)
    with pytest.raises(trainer.ConfigError, match=r"base_lr: 0.003 there, 0.5 now"):
        trainer.train_and_evaluate(tiny_config(base_lr=0.5), tmp_path)


def remove_from_config(workdir, key):
    path = workdir / "config.json"
    config = json.loads(path.read_text())
    *path_to_key, last = key.split(".")
    node = config
    for part in path_to_key:
        node = node[part]
    del node[last]
    path.write_text(json.dumps(config))


def test_a_run_of_before_a_key_was_added_goes_on(tmp_path, monkeypatch):
    monkeypatch.setitem(workdirs.ADDED_KEYS, "sam_rho", 0.0)
    for name in ("whole", "old"):
        with killed_at(7):
            trainer.train_and_evaluate(tiny_config(), tmp_path / name)
    for key in ("sam_rho", "profile_steps"):
        remove_from_config(tmp_path / "old", key)
    with pytest.raises(trainer.ConfigError, match=r"sam_rho: 0.0 there, 0.1 now"):
        trainer.train_and_evaluate(tiny_config(sam_rho=0.1), tmp_path / "old")
    trainer.train_and_evaluate(tiny_config(), tmp_path / "whole")
    trainer.train_and_evaluate(tiny_config(), tmp_path / "old")
    assert_bit_equal(final_params(tmp_path / "old"), final_params(tmp_path / "whole"))


def test_a_field_that_was_added_to_the_model_had_its_default(tmp_path):
    trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)
    remove_from_config(tmp_path, "model.gelu")
    trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)
    remove_from_config(tmp_path, "model.gelu")
    config = tiny_config(total_steps=1, **{"model.gelu": "erf"})
    with pytest.raises(trainer.ConfigError, match=r"model.gelu: tanh there, erf now"):
        trainer.train_and_evaluate(config, tmp_path)


def test_a_key_that_is_absent_without_a_default_is_named(tmp_path):
    trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)
    remove_from_config(tmp_path, "base_lr")
    with pytest.raises(trainer.ConfigError, match=r"base_lr: absent there, 0.003 now"):
        trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)


def test_config_of_a_run_without_a_result_can_be_mended(tmp_path, monkeypatch):
    def fail(*args):
        raise RuntimeError("no evaluators today")

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "open_evaluators", fail)
        with pytest.raises(RuntimeError):
            trainer.train_and_evaluate(tiny_config(total_steps=1), tmp_path)
    assert (tmp_path / "config.json").exists()
    trainer.train_and_evaluate(tiny_config(total_steps=1, base_lr=0.5), tmp_path)
