import dataclasses

import pytest

from configs import common
from mixer_jax.model import MlpMixer
from mixer_jax.run.config import ConfigError
from mixer_jax.run.model import build_model

FIELDS = {
    "patches": {"size": [4, 4]},
    "num_blocks": 2,
    "hidden_dim": 12,
    "tokens_mlp_dim": 6,
    "channels_mlp_dim": 20,
}


def test_every_field_of_a_config_reaches_the_model():
    config = common.get_model("Mixer-B_16").to_dict()
    config |= {"stoch_depth": 0.25, "gelu": "erf", "dtype": "bfloat16"}
    model = build_model(config, 7)
    assert (model.patches.size, model.num_classes) == ((16, 16), 7)
    for name in config.keys() - {"patches"}:
        value = config[name]
        # None stands for the field's default.
        assert getattr(model, name) == (
            getattr(MlpMixer, name) if value is None else value
        )


def test_a_field_that_a_config_lacks_has_its_default():
    """An older run's config.json, of which JSON made its tuples lists."""
    model = build_model(FIELDS, 7)
    assert model.patches.size == (4, 4)
    for field in dataclasses.fields(MlpMixer):
        if field.name not in {*FIELDS, "num_classes", "parent", "name"}:
            assert getattr(model, field.name) == field.default


def test_fields_that_do_not_fit_the_model_are_named():
    with pytest.raises(ConfigError, match=r"gate \(MlpMixer has no such field\)"):
        build_model(FIELDS | {"gate": 1}, 7)
    for name in ("num_classes", "parent", "name"):
        with pytest.raises(
            ConfigError, match=rf"{name} \(MlpMixer has no such field\)"
        ):
            build_model(FIELDS | {name: 1}, 7)
    fields = {key: x for key, x in FIELDS.items() if key != "hidden_dim"}
    with pytest.raises(
        ConfigError, match=r"hidden_dim \(missing\)\. MlpMixer has the f"
    ):
        build_model(fields, 7)
