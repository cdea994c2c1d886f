"""The speed of matrix products here: what a step could reach at the most."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mixer_jax.training import sharding

# Of the square matrices, by the kind of device: what fills the units, and is done soon.
SIZES = {"cpu": (1024, 2048, 3072)}
LARGE_SIZES = (4096, 8192, 16384)


def matmuls(mesh: Mesh, dtype: Any) -> dict[int, tuple[Callable[[], jax.Array], float]]:
    """Returns products of square matrices, in the precision of a training step.

    Every device of the mesh multiplies matrices of its own.

    Args:
      mesh: of the run.
      dtype: of the matrices and of the product.

    Returns:
      By the size of the matrices, a function that multiplies, and the floating-point
      operations that it takes over all devices.
    """
    sizes = SIZES.get(mesh.devices.flat[0].platform, LARGE_SIZES)
    found: dict[int, tuple[Callable[[], jax.Array], float]] = {}
    for size in sizes:
        shape = (mesh.size, size, size)
        make = jax.jit(
            functools.partial(jax.random.normal, shape=shape, dtype=dtype),
            out_shardings=sharding.batch_sharding(mesh),
        )
        a, b = make(jax.random.key(0)), make(jax.random.key(1))
        found[size] = (
            functools.partial(_multiply(mesh), a, b),
            2.0 * mesh.size * size**3,
        )
    return found


def _multiply(mesh: Mesh) -> Any:
    rows = sharding.batch_sharding(mesh)
    return jax.jit(
        jax.shard_map(
            lambda a, b: jnp.matmul(a[0], b[0])[None],
            mesh=mesh,
            in_specs=(rows.spec, rows.spec),
            out_specs=rows.spec,
        )
    )
