"""MLP-Mixer in JAX and Flax."""

from mixer_jax.model import MlpMixer as MlpMixer
from mixer_jax.model import create_model as create_model
from mixer_jax.run.source import load_checkpoint as load_checkpoint
from mixer_jax.run.source import load_pretrained as load_pretrained
from mixer_jax.variants import VARIANTS as VARIANTS
from mixer_jax.weights.npz import save_checkpoint as save_checkpoint
