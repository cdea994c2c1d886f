"""MLP-Mixer (Tolstikhin et al., 2021, https://arxiv.org/abs/2105.01601).

Module names make up the parameter tree of the published checkpoints.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from mixer_jax.variants import get_variant

# What the backward pass keeps of a block, besides its input: all it wants; nothing (the
# block is computed once more); or the matrix products (norms and GELU are).
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


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
    dropout_rate: float = 0.0
    dtype: Any = jnp.float32
    gelu: str = "tanh"

    @nn.compact
    def __call__(
        self, x: jax.Array, keep: jax.Array | None = None, *, train: bool = False
    ) -> jax.Array:
        """Mixes x, [batch, tokens, channels], and returns the same shape.

        Args:
          x: the tokens.
          keep: [2, batch, 1, 1], stochastic depth: 0 where an example drops the
            token-mixing (0) or channel-mixing branch (1), else 1; None keeps all.
          train: whether dropout is on.
        """
        mlp = functools.partial(
            MlpBlock, dropout_rate=self.dropout_rate, dtype=self.dtype, gelu=self.gelu
        )
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = jnp.swapaxes(y, 1, 2)
        y = mlp(self.tokens_mlp_dim, name="token_mixing")(y, train=train)
        y = jnp.swapaxes(y, 1, 2)
        x = x + (y if keep is None else y * keep[0])
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = mlp(self.channels_mlp_dim, name="channel_mixing")(y, train=train)
        return x + (y if keep is None else y * keep[1])


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
      remat: "none"; or to save memory in the backward pass, which costs time: "blocks"
        computes each block but the last once more, "dots" their norms and GELUs but no
        matrix product. On CPU XLA undoes it unless scan_blocks is on.
      scan_blocks: compile one block and loop over all. For TPU that takes a fraction
        of the time, on CPU more. Values are the same, up to which units `dropout_rate`
        drops. Stacking the blocks' parameters costs memory, and no block's
        intermediates can be captured.
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
    remat: str = "none"
    scan_blocks: bool = False

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
            another number of tokens, or `gelu` or `remat` is unknown.
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
        keep = self._draw_stochastic_depth(x.shape[0]) if train else None
        if self.scan_blocks and not self.is_initializing():
            x = self._scan_blocks(x, keep, train)
        else:
            call = functools.partial(MixerBlock.__call__, train=train)
            run = self._rematerialize(call, nn.remat)
            for i in range(self.num_blocks):
                block = self._block(name=f"MixerBlock_{i}")
                args = (block, x, None if keep is None else keep[i])
                # The backward pass begins with the last block: to drop what that keeps
                # and compute it again at once would save nothing.
                x = run(*args) if i < self.num_blocks - 1 else call(*args)
        x = nn.LayerNorm(dtype=self.dtype, name="pre_head_layer_norm")(x)
        x = jnp.mean(x, axis=1, dtype=jnp.float32)
        self.sow("intermediates", "pre_logits", x)
        if self.num_classes:
            head = nn.Dense(
                self.num_classes, kernel_init=nn.initializers.zeros, name="head"
            )
            x = head(x)
        return x

    def _block(self, **kwargs: Any) -> MixerBlock:
        return MixerBlock(
            self.tokens_mlp_dim,
            self.channels_mlp_dim,
            self.dropout_rate,
            self.dtype,
            self.gelu,
            **kwargs,
        )

    def _draw_stochastic_depth(self, batch: int) -> jax.Array | None:
        """Draws what each block keeps, [num_blocks, 2, batch, 1, 1] of 0 and 1.

        As in big_vision: block i drops with probability stoch_depth * i / (last i), and
        what survives is not rescaled.
        """
        if self.stoch_depth == 0.0:
            return None
        drop = (
            self.stoch_depth * jnp.arange(self.num_blocks) / max(self.num_blocks - 1, 1)
        )
        shape = (self.num_blocks, 2, batch, 1, 1)
        keep = jax.random.bernoulli(
            self.make_rng("dropout"), 1.0 - drop.reshape(-1, 1, 1, 1, 1), shape
        )
        return keep.astype(self.dtype)

    def _rematerialize(self, fn: Any, checkpoint: Any, **kwargs: Any) -> Any:
        if self.remat not in REMAT_POLICIES:
            raise ValueError(
                f"remat is {self.remat!r}, expected one of {', '.join(REMAT_POLICIES)}."
            )
        if self.remat == "none":
            return fn
        return checkpoint(fn, policy=REMAT_POLICIES[self.remat], **kwargs)

    def _scan_blocks(
        self, x: jax.Array, keep: jax.Array | None, train: bool
    ) -> jax.Array:
        """Runs the blocks in a loop, over their parameters stacked."""
        params: Any = self.variables["params"]
        blocks = [params[f"MixerBlock_{i}"] for i in range(self.num_blocks)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *blocks)
        keys = None
        if train and self.dropout_rate:
            keys = jax.random.split(self.make_rng("dropout"), self.num_blocks)
        block = self._block(parent=None)

        def body(x: Any, one: Any) -> tuple[Any, None]:
            params, keep, key = one
            rngs = None if key is None else {"dropout": key}
            x = block.apply({"params": params}, x, keep, train=train, rngs=rngs)
            return x, None

        # In a loop XLA has no common subexpressions to eliminate.
        body = self._rematerialize(body, jax.checkpoint, prevent_cse=False)
        return jax.lax.scan(body, x, (stacked, keep, keys))[0]

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
