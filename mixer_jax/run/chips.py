"""Published figures of TPU chips."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip; nan where there are none."""

    device_kind: str  # JAX's name for it
    hbm_bytes: float = math.nan
    flops_per_sec: float = math.nan  # peak of matrix products in bfloat16
    hbm_bytes_per_sec: float = math.nan
    network_bytes_per_sec: float = math.nan  # to other chips, each way, all links


# By the name in a topology. From https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e),
# the last column from their "Interchip Interconnect BW": 2400, 1600, 4800, 3584 Gbps.
CHIPS = {
    "v4": Chip("TPU v4", 32e9, 275e12, 1200e9, 300e9),
    "v5e": Chip("TPU v5 lite", 16e9, 197e12, 819e9, 200e9),
    "v5p": Chip("TPU v5", 95e9, 459e12, 2765e9, 600e9),
    "v6e": Chip("TPU v6 lite", 32e9, 918e12, 1640e9, 448e9),
}


def chip_of(device_kind: str) -> Chip:
    """Returns the figures of a device by `jax.Device.device_kind`."""
    known = (x for x in CHIPS.values() if x.device_kind == device_kind)
    return next(known, Chip(device_kind))
