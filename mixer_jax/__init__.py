"""MLP-Mixer in JAX and Flax."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mixer_jax.model import MlpMixer as MlpMixer
    from mixer_jax.model import create_model as create_model
    from mixer_jax.run.source import load_checkpoint as load_checkpoint
    from mixer_jax.run.source import load_pretrained as load_pretrained
    from mixer_jax.variants import VARIANTS as VARIANTS
    from mixer_jax.weights.npz import save_checkpoint as save_checkpoint

# Imported when they are asked for, so that what reads images needs no jax.
_MODULES = {
    "MlpMixer": "mixer_jax.model",
    "VARIANTS": "mixer_jax.variants",
    "create_model": "mixer_jax.model",
    "load_checkpoint": "mixer_jax.run.source",
    "load_pretrained": "mixer_jax.run.source",
    "save_checkpoint": "mixer_jax.weights.npz",
}
__all__ = list(_MODULES)


if not TYPE_CHECKING:  # a checker would take any name for one that is there

    def __getattr__(name: str) -> Any:
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = getattr(importlib.import_module(_MODULES[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_MODULES})
