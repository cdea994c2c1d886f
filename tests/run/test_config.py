"""Every key of a config has values that it may have, and others get one message."""

import copy

import pytest

from configs import common
from mixer_jax.data import dataset as datasets
from mixer_jax.run import config as run_config
from mixer_jax.run import trainer
from mixer_jax.run.config import ConfigError, check_config
from mixer_jax.run.keys import KEYS

from .test_trainer import tiny_config


def with_evaluator(**overrides):
    config = tiny_config()
    common.add_evaluator(config, "more")
    return changed(config, **overrides)


def changed(config, **overrides):
    """Sets values as a config from Python may: of any type."""
    config = copy.deepcopy(config)
    with config.ignore_type(), config.unlocked():
        for key, value in overrides.items():
            *path, last = key.split(".")
            node = config
            for name in path:
                node = node[name]
            node[last] = value
    return config


def test_every_key_has_a_row_and_every_default_is_allowed():
    config = common.get_config()
    common.add_evaluator(config, "more")
    check_config(config)
    keys = run_config.flatten(config.to_dict())
    rows = {key.replace("evals.more.", "evals.*.") for key in keys}
    assert rows == set(KEYS)


WRONG = [
    ("pretrained_dir", "None"),
    ("resolution", "bigger"),
    ("resolution", None),
    ("dataset", ""),
    ("dataset", None),
    ("tfds_data_dir", "None"),
    ("tfds_manual_dir", 3),
    ("pp.train", 3),
    ("pp.test", 5),
    ("pp.crop", 0),
    ("pp.crop", 8.0),
    ("pp.crop", (8,)),
    ("pp.crop", (8, 0)),
    ("pp.crop", "8x12"),
    ("pp.crop", None),
    ("pp.resize", -1),
    ("pp.resize", (8, 8, 8)),
    ("pp.interpolation", "cubic"),
    ("pp.mean", (0.5, 0.5)),
    ("pp.interpolation", ""),
    ("pp.mean", "0.5"),
    ("pp.mean", ""),
    ("pp.mean", float("nan")),
    ("pp.mean", 127.5),
    ("pp.std", 58.4),
    ("pp.std", 0.0),
    ("pp.std", (0.5, 0.5, -0.5)),
    ("pp.evaluation", "crop"),
    ("pp.area_range", (1.0, 0.05)),
    ("pp.area_range", (0.0, 1.0)),
    ("pp.area_range", (0.5, 1.1)),
    ("pp.area_range", 0.5),
    ("pp.aspect_range", (1.33, 0.75)),
    ("pp.aspect_range", ("a", "b")),
    ("pp.flip", 1),
    ("pp.transfer", "int8"),
    ("pp.randaugment", (2, -1)),
    ("pp.randaugment", (1.5, 3)),
    ("pp.randaugment", 2),
    ("pp.permute", "rows"),
    ("seed", -1),
    ("seed", 2**32),
    ("total_steps", -1),
    ("total_steps", "many"),
    ("total_epochs", -0.5),
    ("total_examples", 1.5),
    ("batch", 0),
    ("batch", True),
    ("batch", "512"),
    ("accum_steps", 0),
    ("batch_eval", 0),
    ("prefetch", 0),
    ("workers", -1),
    ("loss", "hinge"),
    ("label_smoothing", 2.0),
    ("label_smoothing", -0.1),
    ("mixup_p", -0.5),
    ("head_bias_init", float("nan")),
    ("optimizer", "lamb"),
    ("optim_dtype", "fp16"),
    ("grad_norm_clip", -1.0),
    ("weight_decay", -0.1),
    ("base_lr", -1.0),
    ("base_lr", float("inf")),
    ("base_lr", "0.1"),
    ("warmup_steps", -1),
    ("warmup_epochs", -1.0),
    ("warmup_examples", -1),
    ("decay_type", "exp"),
    ("linear_end", -1e-5),
    ("lr_multipliers", (("head/(", 1.0),)),
    ("lr_multipliers", (("head/.*", -1.0),)),
    ("lr_multipliers", ("head/.*", 1.0)),
    ("sam_rho", -1.0),
    ("on_nonfinite", "ignore"),
    ("nonfinite_limit", 0),
    ("eval_every", 0),
    ("checkpoint_every", 0),
    ("keep_checkpoints", 0),
    ("progress_every", 0),
    ("profile_steps", -1),
    ("max_run_secs", -1),
    ("mesh.fsdp", 0),
    ("init_from", 3),
    ("label_key", 1),
    ("evals.more.type", "knn"),
    ("evals.more.dataset", 3),
    ("evals.more.split", None),
    ("evals.more.label_key", 1),
    ("evals.more.evaluation", "crop"),
    ("evals.more.resize", -1),
    ("evals.more.resize", (0, 8)),
    ("evals.more.every", -1),
    ("evals.more.train_split", ""),
    ("evals.more.shots", ()),
    ("evals.more.shots", (0, 5)),
    ("model.model_name", None),
    ("model.patches.size", 8),
    ("model.patches.size", (8, 0)),
    ("model.num_blocks", 0),
    ("model.hidden_dim", -1),
    ("model.tokens_mlp_dim", 0),
    ("model.channels_mlp_dim", 1.5),
    ("model.stoch_depth", 1.0),
    ("model.dropout_rate", -0.1),
    ("model.dtype", "float16"),
    ("model.remat", "all"),
    ("model.scan_blocks", None),
    ("model.gelu", "relu"),
    ("model.layer_norm_epsilon", -1e-6),
]


def test_every_row_is_tried_with_a_wrong_value():
    tried = {key.replace("evals.more.", "evals.*.") for key, _ in WRONG}
    assert tried == set(KEYS)


def test_texts_that_a_flag_leaves_empty_are_none_and_clip_0_is_no_limit():
    config = tiny_config(grad_norm_clip=0.0, **{"pp.train": "", "pp.permute": ""})
    check_config(config)


@pytest.fixture
def refuse(tmp_path, monkeypatch):
    """Returns the message with which a run ends before it opens anything."""

    def open_dataset(*args, **kwargs):
        raise AssertionError("a dataset was opened")

    monkeypatch.setattr(datasets, "open_dataset", open_dataset)

    def run(config):
        with pytest.raises(ConfigError) as error:
            trainer.train_and_evaluate(config, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        return str(error.value)

    return run


@pytest.mark.parametrize(("key", "value"), WRONG)
def test_a_wrong_value_is_named_with_what_is_expected(refuse, key, value):
    message = refuse(with_evaluator(**{key: value}))
    expected = KEYS[key.replace("evals.more.", "evals.*.")].expected
    assert message == f"{key} is {value!r}; expected {expected}."


def test_all_wrong_values_are_named_at_once(refuse):
    message = refuse(tiny_config(base_lr=-1.0, sam_rho=-1.0))
    assert [line.split()[0] for line in message.splitlines()] == ["base_lr", "sam_rho"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"pp.crop": 9}, "pp.crop is 9: 9x9 pixels cannot be cut into patches of 4x4"),
        ({"pp.crop": 9}, "(model.patches.size). Take a multiple of 4, such as 8."),
        ({"pp.crop": 3}, "Take a multiple of 4, such as 4."),
        (
            {"pp.crop": (9, 12)},
            "pp.crop is (9, 12): 9x12 pixels cannot be cut into patches of 4x4 "
            "(model.patches.size). Take multiples of these, such as (8,12).",
        ),
        ({"pp.crop": (8, 3)}, "such as (8,4)."),
        (
            {
                "pp.crop": (8, 12),
                "pp.evaluation": "torchvision",
                "pp.resize": (12, 8),
            },
            "pp.resize is (12, 8); torchvision cuts 8x12 pixels (pp.crop) out of it",
        ),
        ({"model.patches.size": (8, 3)}, "cut into patches of 8x3"),
        ({"model.patches.size": (8, 3)}, "Take a multiple of 24, such as 24."),
        (
            {"pp.evaluation": "resize_then_central_crop", "pp.resize": 4},
            "pp.resize is 4; resize_then_central_crop cuts 8x8 pixels",
        ),
        (
            {"evals.more.evaluation": "resize_then_central_crop", "pp.resize": 4},
            "evals.more.resize is 4; resize_then_central_crop cuts 8x8 pixels",
        ),
        ({"sam_rho": 0.1, "lr_multipliers": (("head/.*", 0.0),)}, "sam_rho and a fact"),
        ({"lr_multipliers": (("heads/.*", 0.0),)}, "heads/.* decides for no parameter"),
        ({"total_epochs": 2.0}, "total_steps 12 and total_epochs 2.0: give one"),
        ({"total_steps": 0}, "The run has no steps"),
        ({"warmup_epochs": 1.0}, "warmup_steps 2 and warmup_epochs 1.0"),
        ({"mesh.fsdp": 3}, "mesh.fsdp is 3, which does not divide 8 devices"),
        ({"batch": 12}, "it must be a multiple of 8, such as 16"),
        (
            {"batch": 24, "accum_steps": 2},
            "and accum_steps 2 it must be a multiple of 16",
        ),
        ({"batch": 32, "accum_steps": 8}, "such as 64. Or set accum_steps to 4"),
        (
            {"batch_eval": 4},
            "batch_eval is 4; with 8 devices it must be a multiple of 8",
        ),
        (
            {"resolution": "interpolate"},
            "resolution is interpolate, and pretrained_dir",
        ),
        ({"evals.mine": {}}, "evals.mine has no dataset"),
        ({"new_key": 3}, "a key new_key, which mixer_jax/run/keys.py does not list"),
        ({"base_lrs": 0.1}, "does not list. Did you mean base_lr?"),
        ({"model.gama": 1.0}, "gama (MlpMixer has no such field)"),
    ],
)
def test_values_that_do_not_go_together(refuse, overrides, message):
    assert message in refuse(with_evaluator(**overrides))


def test_the_name_of_an_evaluator_is_not_that_of_the_run(refuse):
    config = tiny_config()
    common.add_evaluator(config, "test")
    assert "evals.test needs another name" in refuse(config)


@pytest.mark.parametrize("key", ["base_lr", "pp.crop", "mesh", "evals", "model"])
def test_a_key_that_is_missing(refuse, key):
    config = copy.deepcopy(tiny_config())
    with config.unlocked():
        *path, last = key.split(".")
        node = config
        for name in path:
            node = node[name]
        del node[last]
    assert f"The config has no {key}" in refuse(config)


def test_a_field_of_a_forks_own_model_needs_no_row():
    check_config(with_evaluator(**{"model.gamma": 0.1}))
    config = copy.deepcopy(tiny_config())
    with config.unlocked():
        del config.model["gelu"]  # of a fork that has none
    check_config(config)


def test_values_of_the_run_stand_in_for_those_that_an_evaluator_lacks():
    config = with_evaluator(**{"evals.more.every": 5})
    (spec,) = run_config.evals(config).values()
    assert (spec.dataset, spec.evaluation, spec.resize) == ("digits", "resize", 256)
    assert spec.every == 5
    assert config.evals.more.dataset is None  # the config itself is as it was


def test_durations_are_rounded_to_steps():
    config = tiny_config(
        total_steps=0, total_epochs=0.1, warmup_steps=0, warmup_examples=48
    )
    steps = run_config.in_steps(config, num_examples=1433)
    assert (steps.total_steps, steps.warmup_steps) == (9, 3)
    assert config.total_steps == 0
    with pytest.raises(ConfigError, match="20 examples in batches of 16 make less"):
        run_config.in_steps(config, num_examples=20)
