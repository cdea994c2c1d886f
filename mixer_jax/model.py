"""MLP-Mixer (arXiv 2105.01601), with the parameter names of the published files."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange
from flax.linen.initializers import zeros

from mixer_jax.blocks import draw_stochastic_depth, run_blocks
from mixer_jax.variants import count_patches, get_variant

# The approximation that Google's weights were trained with; the exact function (timm).
GELUS: Any = {"tanh": nn.gelu, "erf": functools.partial(nn.gelu, approximate=False)}


class MlpBlock(nn.Module):
    """Dense, GELU, Dense over the last axis: [..., d] to [..., d] (equation 1)."""

    mlp_dim: int
    dropout_rate: float = 0.0
    dtype: Any = "float32"
    gelu: str = "tanh"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps x with `mlp_dim` hidden units."""
        if self.gelu not in GELUS:
            raise ValueError(f"gelu is {self.gelu!r}, expected {' or '.join(GELUS)}.")
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        # For the gradient of a kernel XLA for CPU copies x, unless it is a matrix. So
        # B/16 trains in 0.9 of the time (benchmarks/peers.py). On TPU, in bfloat16, to
        # make it a matrix is a copy: 1.2 times the bytes are moved.
        y = rearrange(x, "... d -> (...) d") if x.dtype == jnp.float32 else x
        y = nn.Dense(self.mlp_dim, dtype=self.dtype)(y)
        y = dropout(GELUS[self.gelu](y))
        y = nn.Dense(x.shape[-1], dtype=self.dtype)(y)
        return dropout(y).reshape(x.shape)


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each a residual branch (figure 1)."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    dropout_rate: float = 0.0
    dtype: Any = "float32"
    gelu: str = "tanh"
    layer_norm_epsilon: float = 1e-6

    @nn.compact
    def __call__(
        self, x: jax.Array, keep: Any = (1, 1), *, train: bool = False
    ) -> jax.Array:
        """Mixes x [batch, tokens, channels]; `keep` has a factor for each branch."""
        mlp = functools.partial(
            MlpBlock, dropout_rate=self.dropout_rate, dtype=self.dtype, gelu=self.gelu
        )
        norm = functools.partial(nn.LayerNorm, self.layer_norm_epsilon, self.dtype)
        y = norm()(x)
        y = rearrange(y, "n s c -> n c s")
        y = mlp(self.tokens_mlp_dim, name="token_mixing")(y, train=train)
        y = rearrange(y, "n c s -> n s c")
        x = x + keep[0] * y
        y = norm()(x)
        y = mlp(self.channels_mlp_dim, name="channel_mixing")(y, train=train)
        return x + keep[1] * y


class MlpMixer(nn.Module):
    """Stem, Mixer blocks, LayerNorm, mean over tokens, head.

    Every field but num_classes is a key of `config.model`. Parameters, LayerNorm
    statistics, the mean over tokens and the head are float32 whatever `dtype` is.
    """

    patches: Any  # has a field `size`, (height, width) of a patch in pixels
    num_classes: int | None  # 0 or None: no head, pre_logits are returned
    num_blocks: int
    hidden_dim: int  # channels C of a token
    tokens_mlp_dim: int  # hidden units D_S of the token-mixing MLPs
    channels_mlp_dim: int  # hidden units D_C of the channel-mixing MLPs
    model_name: str | None = None  # a label; nothing depends on it
    stoch_depth: float = 0.0  # of the last block; see draw_stochastic_depth
    dropout_rate: float = 0.0  # after the GELU and the second Dense of every MLP
    dtype: Any = "float32"  # of the activations
    gelu: str = "tanh"  # a key of GELUS
    layer_norm_epsilon: float = 1e-6  # mlp-mixer-pytorch has 1e-5
    remat: str = "none"  # a key of REMAT_POLICIES, to save memory in training
    scan_blocks: bool = False  # compile one block for all: faster on TPU, slower on CPU

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        """Maps images [batch, height, width, channels] to float32 logits.

        Images are in [-1, 1], unless the parameters were trained on others (pp.mean).
        Logits are [batch, num_classes]. A model without a head returns pre_logits
        [batch, hidden_dim], which are in the collection "intermediates" in any case.
        `train` turns dropout and stochastic depth on (rng `dropout`). Raises ValueError
        if the image cannot be cut into whole patches.
        """
        size = tuple(self.patches.size)
        count_patches(inputs.shape[1:3], size)  # Conv would leave out the last pixels
        conv = nn.Conv(
            self.hidden_dim, size, size, "VALID", dtype=self.dtype, name="stem"
        )
        x = rearrange(conv(inputs), "n h w c -> n (h w) c")
        block = functools.partial(
            MixerBlock,
            tokens_mlp_dim=self.tokens_mlp_dim,
            channels_mlp_dim=self.channels_mlp_dim,
            dropout_rate=self.dropout_rate,
            dtype=self.dtype,
            gelu=self.gelu,
            layer_norm_epsilon=self.layer_norm_epsilon,
        )
        blocks = [block(name=f"MixerBlock_{i}") for i in range(self.num_blocks)]
        keep: Any = self.num_blocks * [(1, 1)]
        if train and self.stoch_depth:
            rng, shape = self.make_rng("dropout"), (self.num_blocks, len(x))
            keep = draw_stochastic_depth(rng, self.stoch_depth, shape, self.dtype)
        x = run_blocks(blocks, x, keep, train, self.remat, self.scan_blocks)
        x = nn.LayerNorm(
            self.layer_norm_epsilon, self.dtype, name="pre_head_layer_norm"
        )(x)
        x = jnp.mean(x, axis=1, dtype=jnp.float32)
        self.sow("intermediates", "pre_logits", x)
        if self.num_classes:
            x = nn.Dense(self.num_classes, kernel_init=zeros, name="head")(x)
        return x


def create_model(name: str, num_classes: int | None = 1000, **fields: Any) -> MlpMixer:
    """Returns a variant, with any field of MlpMixer changed.

    Args:
      name: such as "B/16" or "Mixer-B_16"; ValueError if VARIANTS has no such name.
      num_classes: classes of the head; 0 or None for none.
      **fields: fields of MlpMixer; TypeError if it has no such field.
    """
    fields = {**vars(get_variant(name)), "model_name": name, **fields}
    return MlpMixer(num_classes=num_classes, **fields)
