"""How a stack of blocks is run: in turn or as a loop, and what is kept for gradients.

The architecture is in `mixer_jax.model`; nothing here knows what a block computes.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from einops import rearrange

# What the backward pass finds saved of a block, besides its input: everything; nothing
# (the block is computed a second time); or the matrix products (norms and GELU are
# computed a second time).
REMAT_POLICIES = {
    "none": jax.checkpoint_policies.everything_saveable,
    "blocks": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_saveable,
}


def draw_stochastic_depth(
    rng: jax.Array, rate: float, shape: tuple[int, int], dtype: Any
) -> jax.Array:
    """Draws which branches each block keeps for each example (big_vision).

    Block i of L drops a branch with probability rate * i / (L - 1). What is kept is not
    rescaled.

    Args:
      rng: a key.
      rate: probability of dropping each branch of the last block.
      shape: (number of blocks L, batch).
      dtype: of the result.

    Returns:
      [L, 2, batch, 1, 1] of 0 (dropped) and 1 (kept).
    """
    num_blocks, batch = shape
    drop = rate * jnp.arange(num_blocks) / max(num_blocks - 1, 1)
    drop = rearrange(drop, "blocks -> blocks 1 1 1 1")
    keep = jax.random.bernoulli(rng, 1.0 - drop, (num_blocks, 2, batch, 1, 1))
    return keep.astype(dtype)


def run_blocks(
    blocks: Sequence[nn.Module],
    x: jax.Array,
    keep: Any,
    train: bool,
    remat: str = "none",
    scan: bool = False,
) -> jax.Array:
    """Applies blocks one after the other.

    Args:
      blocks: bound modules with parameters of the same shapes. Each is called as
        `block(x, keep, train=train)` and returns the next x.
      x: [batch, tokens, channels].
      keep: for each block, what it gets as `keep`.
      train: what each block gets as `train`.
      remat: a key of REMAT_POLICIES. It saves memory and costs time.
      scan: compile one block and loop over the stacked parameters of all.

    Returns:
      What the last block returns.

    Raises:
      ValueError: `remat` is unknown.
    """
    if remat not in REMAT_POLICIES:
        raise ValueError(
            f"remat is {remat!r}, expected one of {', '.join(REMAT_POLICIES)}."
        )
    if scan and not blocks[0].is_initializing():
        return _scan_blocks(blocks, x, keep, train, remat)

    def call(block: Any, x: jax.Array, keep: Any) -> jax.Array:
        return block(x, keep, train=train)

    remat_call: Any = call
    if remat != "none":
        remat_call = nn.remat(call, policy=REMAT_POLICIES[remat])
    for i, block in enumerate(blocks[:-1]):
        x = remat_call(block, x, keep[i])
    # The backward pass begins with the last block. To drop what that block saves, and
    # compute it again at once, would save nothing.
    return call(blocks[-1], x, keep[-1])


def _scan_blocks(
    blocks: Sequence[nn.Module], x: jax.Array, keep: Any, train: bool, remat: str
) -> jax.Array:
    variables = [block.variables for block in blocks]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *variables)
    keys = None
    if train and blocks[0].has_rng("dropout"):
        keys = jax.random.split(blocks[0].make_rng("dropout"), len(blocks))
    block = blocks[0].clone(parent=None)

    def body(x: jax.Array, one: Any) -> tuple[Any, None]:
        variables, keep, key = one
        rngs = None if key is None else {"dropout": key}
        return block.apply(variables, x, keep, train=train, rngs=rngs), None

    if remat != "none":
        # In a loop XLA has no common subexpressions to eliminate.
        policy = REMAT_POLICIES[remat]
        body = jax.checkpoint(body, policy=policy, prevent_cse=False)
    return jax.lax.scan(body, x, (stacked, jnp.asarray(keep, x.dtype), keys))[0]
