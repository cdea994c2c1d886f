"""Where batches and state live: one mesh of all devices, axes "data" and "fsdp".

Each device computes on some rows of a batch. The large parameters and their optimizer
state are split over "fsdp"; with fsdp=1 they are replicated. XLA derives the
communication.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

# Splitting small arrays saves nothing and costs a message each.
MIN_SPLIT_SIZE = 2**16


def create_mesh(fsdp: int = 1, devices: Sequence[Any] | None = None) -> Mesh:
    """Returns a mesh ("data", "fsdp") that follows the devices' connections if it can.

    Args:
      fsdp: devices that share one copy of the state.
      devices: that make up the mesh; None for all of all processes.

    Raises:
      ValueError: fsdp does not divide the number of devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    if fsdp < 1 or count % fsdp:
        raise ValueError(
            f"mesh.fsdp is {fsdp}, which does not divide the {count} devices."
        )
    # The last argument allows an axis that is a part of a physical one: 2 of 4 x 4.
    grid = mesh_utils.create_device_mesh(
        (count // fsdp, fsdp), devices, allow_split_physical_axes=True
    )
    return Mesh(grid, ("data", "fsdp"), axis_types=(AxisType.Auto, AxisType.Auto))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array of which every device holds a whole copy."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of a batch: rows over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(mesh: Mesh, state: Any) -> Any:
    """Returns shardings for a tree of arrays or their shapes.

    Arrays of at least MIN_SPLIT_SIZE elements are split over "fsdp", along the longest
    axis that it divides. All others are replicated.
    """
    fsdp = mesh.shape["fsdp"]

    def shard(x: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(x.shape) if size % fsdp == 0]
        if fsdp == 1 or x.size < MIN_SPLIT_SIZE or not axes:
            return replicated(mesh)
        longest = max(axes, key=lambda axis: x.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * longest, "fsdp"))

    return jax.tree.map(shard, state)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes on a device of arrays, or of their shapes with a sharding."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """Returns XLA's options for a training step on `mesh`.

    By default XLA for TPU gathers a split parameter piece by piece, in a loop of small
    products. Each of them reads the activations from memory again: the blocks of H/14
    then moved more than twice the bytes.
    """
    if mesh.shape["fsdp"] == 1 or mesh.devices.flat[0].platform != "tpu":
        return None
    return {"xla_jf_spmd_threshold_for_windowed_einsum_mib": "1000000"}


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns which rows of a batch are this process's, in ascending order.

    On a pod these need not be consecutive, as the mesh follows the connections.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
    parts = {index[0].indices(batch_size) for index in places.values() if index}
    return [row for part in sorted(parts) for row in range(*part)]


def shard_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    """Sends this process's rows of a batch, those of local_rows, to its devices.

    Returns arrays of the whole batch, over all processes.
    """
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_process_local_data(sharding, rows)
        for key, rows in batch.items()
    }
