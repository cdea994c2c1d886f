"""The model that a config describes."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from mixer_jax.model import MlpMixer
from mixer_jax.run.config import ConfigError
from mixer_jax.variants import Patches

_NOT_IN_CONFIGS = {"num_classes", "parent", "name"}  # the last two are Flax's

# The defaults of the model's fields by their key in a config, as a config.json has them
# (with lists for tuples). In a run of before a field was added, it had its default.
FIELD_DEFAULTS = {
    f"model.{x.name}": json.loads(json.dumps(x.default, default=str))
    for x in dataclasses.fields(MlpMixer)
    if x.name not in _NOT_IN_CONFIGS and x.default is not dataclasses.MISSING
}


def build_model(fields: Mapping[str, Any], num_classes: int) -> MlpMixer:
    """Returns the model of `config.model`, from a config or a config.json.

    Args:
      fields: by the names of MlpMixer's fields. One that is absent or None has its
        default.
      num_classes: of the dataset.

    Raises:
      ConfigError: MlpMixer has no such field, or one without a default is absent.
    """
    known = [x for x in dataclasses.fields(MlpMixer) if x.name not in _NOT_IN_CONFIGS]
    names = [x.name for x in known]
    wrong = [f"{x} (MlpMixer has no such field)" for x in fields if x not in names]
    wrong += [
        f"{x.name} (missing)"
        for x in known
        if x.default is x.default_factory is dataclasses.MISSING
        and x.name not in fields
    ]
    if wrong:
        raise ConfigError(
            f"config.model does not fit mixer_jax/model.py: {', '.join(wrong)}. "
            f"MlpMixer has the fields {', '.join(names)}."
        )
    # JSON has lists where the config has tuples.
    values: dict[str, Any] = {
        k: tuple(x) if isinstance(x, list) else x
        for k, x in fields.items()
        if x is not None
    }
    values["patches"] = Patches(tuple(fields["patches"]["size"]))
    return MlpMixer(num_classes=num_classes, **values)
