"""MLP-Mixer in JAX and Flax."""

from mixer_jax.model import MlpMixer as MlpMixer
from mixer_jax.model import create_model as create_model
from mixer_jax.variants import VARIANTS as VARIANTS
