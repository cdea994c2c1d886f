"""MLP-Mixer (Tolstikhin et al., 2021, https://arxiv.org/abs/2105.01601).

Module names make up the parameter tree of the published checkpoints.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixer_jax.variants import get_variant


class Patches(NamedTuple):
    """Size of a patch, (height, width) in pixels."""

    size: tuple[int, int]


class MlpBlock(nn.Module):
    """Dense, GELU, Dense over the last axis: [..., d] to [..., d] (equation 1)."""

    mlp_dim: int
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    gelu: str = "tanh"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Maps [..., d] to [..., d] by way of `mlp_dim` hidden units."""
        if self.gelu not in ("tanh", "erf"):
            raise ValueError(f"gelu is {self.gelu!r}, expected 'tanh' or 'erf'.")
        dropout = nn.Dropout(self.dropout_rate, deterministic=not train)
        y = nn.Dense(self.mlp_dim, dtype=self.dtype)(x)
        y = dropout(nn.gelu(y, approximate=self.gelu == "tanh"))
        y = nn.Dense(x.shape[-1], dtype=self.dtype)(y)
        return dropout(y)


class MixerBlock(nn.Module):
    """Token mixing, then channel mixing, each a residual branch (figure 1)."""

    tokens_mlp_dim: int
    channels_mlp_dim: int
    stoch_depth: float = 0.0
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    gelu: str = "tanh"

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool = False) -> jax.Array:
        """Mixes x, [batch, tokens, channels], and returns the same shape."""
        mlp = functools.partial(
            MlpBlock, dropout_rate=self.dropout_rate, dtype=self.dtype, gelu=self.gelu
        )
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = jnp.swapaxes(y, 1, 2)
        y = mlp(self.tokens_mlp_dim, name="token_mixing")(y, train=train)
        y = jnp.swapaxes(y, 1, 2)
        x = x + self._drop_branch(y, train)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = mlp(self.channels_mlp_dim, name="channel_mixing")(y, train=train)
        return x + self._drop_branch(y, train)

    def _drop_branch(self, y: jax.Array, train: bool) -> jax.Array:
        """Stochastic depth as in big_vision: what survives is not rescaled."""
        if not train or self.stoch_depth == 0.0:
            return y
        keep = jax.random.bernoulli(
            self.make_rng("dropout"), 1.0 - self.stoch_depth, (y.shape[0], 1, 1)
        )
        return y * keep.astype(y.dtype)


class MlpMixer(nn.Module):
    """MLP-Mixer.

    Attributes:
      patches: has a field `size`, (height, width) of a patch in pixels.
      num_classes: classes of the head; 0 or None returns pre_logits instead.
      num_blocks: number of Mixer blocks.
      hidden_dim: channels C of a token.
      tokens_mlp_dim: hidden units D_S of the token-mixing MLPs.
      channels_mlp_dim: hidden units D_C of the channel-mixing MLPs.
      model_name: a label; nothing depends on it.
      stoch_depth: probability of dropping each branch of the last block, rising
        linearly from 0 at the first (big_vision). Needs the rng `dropout` in training.
      dropout_rate: after the GELU and after the second Dense of every MLP.
      dtype: of the activations. Parameters, LayerNorm statistics, the mean over
        tokens and the head stay float32.
      gelu: "tanh", the approximation that the published weights were trained with,
        or "erf", the exact function, for weights from PyTorch (timm).
    """

    patches: Any
    num_classes: int | None
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    model_name: str | None = None
    stoch_depth: float = 0.0
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    gelu: str = "tanh"

    @nn.compact
    def __call__(self, inputs: jax.Array, *, train: bool) -> jax.Array:
        """Classifies images.

        Args:
          inputs: [batch, height, width, image channels], in [-1, 1].
          train: whether dropout and stochastic depth are on.

        Returns:
          logits [batch, num_classes] in float32, or without a head pre_logits
          [batch, hidden_dim]. With mutable=["intermediates"] pre_logits are there
          under that name too.

        Raises:
          ValueError: the patch does not divide the image, the parameters are for
            another number of tokens, or `gelu` is unknown.
        """
        self._check_image_size(inputs.shape)
        patch_size = tuple(self.patches.size)
        x = nn.Conv(
            self.hidden_dim,
            patch_size,
            strides=patch_size,
            padding="VALID",
            dtype=self.dtype,
            name="stem",
        )(inputs)
        x = x.reshape(x.shape[0], -1, x.shape[-1])  # the grid, row by row
        for i in range(self.num_blocks):
            x = MixerBlock(
                self.tokens_mlp_dim,
                self.channels_mlp_dim,
                self.stoch_depth * i / max(self.num_blocks - 1, 1),
                self.dropout_rate,
                self.dtype,
                self.gelu,
                name=f"MixerBlock_{i}",
            )(x, train=train)
        x = nn.LayerNorm(dtype=self.dtype, name="pre_head_layer_norm")(x)
        x = jnp.mean(x, axis=1, dtype=jnp.float32)
        self.sow("intermediates", "pre_logits", x)
        if self.num_classes:
            head = nn.Dense(
                self.num_classes, kernel_init=nn.initializers.zeros, name="head"
            )
            x = head(x)
        return x

    def _check_image_size(self, shape: tuple[int, ...]) -> None:
        height, width = shape[1:3]
        patch_height, patch_width = self.patches.size
        if height % patch_height or width % patch_width:
            raise ValueError(
                f"Images of {height}x{width} pixels cannot be cut into patches of "
                f"{patch_height}x{patch_width}. Resize them to a multiple of the patch."
            )
        tokens = (height // patch_height) * (width // patch_width)
        block: Any = self.get_variable("params", "MixerBlock_0")
        if block is None:  # initialising
            return
        trained_tokens = block["token_mixing"]["Dense_0"]["kernel"].shape[0]
        if tokens != trained_tokens:
            raise ValueError(
                f"Images of {height}x{width} pixels in patches of "
                f"{patch_height}x{patch_width} make {tokens} tokens, but the "
                f"parameters are for {trained_tokens}. Token mixing fixes their "
                "number: resize the images to the size the parameters were made for."
            )


def create_model(
    name: str, num_classes: int | None = 1000, **overrides: Any
) -> MlpMixer:
    """Returns the Mixer called `name`, such as "B/16" or "Mixer-B_16".

    Args:
      name: a key of `mixer_jax.variants.VARIANTS`, in either spelling.
      num_classes: classes of the head; 0 or None for none.
      **overrides: fields of MlpMixer to set otherwise than the variant does.

    Raises:
      ValueError: no variant has that name.
      TypeError: an override is not a field of MlpMixer.
    """
    variant = get_variant(name)
    fields: dict[str, Any] = {
        "patches": Patches((variant.patch_size, variant.patch_size)),
        "num_blocks": variant.num_blocks,
        "hidden_dim": variant.hidden_dim,
        "tokens_mlp_dim": variant.tokens_mlp_dim,
        "channels_mlp_dim": variant.channels_mlp_dim,
        "model_name": name,
    }
    return MlpMixer(num_classes=num_classes, **(fields | overrides))
