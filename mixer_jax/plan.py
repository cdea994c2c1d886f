"""A dry run: does a training step fit devices that are not here, and how fast at best?

mixer-jax plan --config configs/b16.py --topology v5e:2x4

compiles the very step of a run ahead of time, by libtpu (the extra `tpu`), and reads
what the compiler reports. Nothing is computed, and no TPU is needed.
"""

import copy
import dataclasses
import math
import os
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from mixer_jax.compiled import Counts, read_out_of_memory
from mixer_jax.run.config import check_config, check_devices, for_platform
from mixer_jax.run.program import build_program
from mixer_jax.training import sharding

Config = Any  # an ml_collections.ConfigDict with the keys of configs/common.py


@dataclasses.dataclass(frozen=True)
class Chip:
    """What its maker publishes about a chip.

    Attributes:
      device_kind: what JAX calls it.
      hbm_bytes: its memory.
      flops_per_sec: peak of matrix products in bfloat16.
      hbm_bytes_per_sec: peak of its memory.
    """

    device_kind: str
    hbm_bytes: float
    flops_per_sec: float
    hbm_bytes_per_sec: float


# By the name in a topology. From https://cloud.google.com/tpu/docs/v4 (v5e, v5p, v6e).
CHIPS = {
    "v4": Chip("TPU v4", 32e9, 275e12, 1200e9),
    "v5e": Chip("TPU v5 lite", 16e9, 197e12, 819e9),
    "v5p": Chip("TPU v5", 95e9, 459e12, 2765e9),
    "v6e": Chip("TPU v6 lite", 32e9, 918e12, 1640e9),
}


class PlanError(RuntimeError):
    """The topology is unknown, or what compiles for it is missing."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one update needs. Memory and work are those of one chip.

    Attributes:
      config: that was planned, without None where the platform decides.
      topology: such as "v5e:2x4", or "local".
      chips: number of chips.
      chip: published figures; None if the device is none of CHIPS.
      params_bytes: parameters.
      opt_state_bytes: optimizer state.
      temporary_bytes: what XLA sets aside for the rest of the step.
      peak_bytes: arguments, results and temporaries; at or above what is in use at
        any time.
      compile_secs: how long the compilation of the step took here.
      counts: None if the step is too large for the compiler to accept.
      changes: if it does not fit, what was tried, each on top of the one before: values
        of the config, and peak_bytes with them.
    """

    config: Config
    topology: str
    chips: int
    chip: Chip | None
    params_bytes: int
    opt_state_bytes: int
    temporary_bytes: int
    peak_bytes: int
    compile_secs: float
    counts: Counts | None
    changes: tuple[tuple[dict[str, Any], int], ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the chip's memory; None if that is not known."""
        return None if self.chip is None else self.peak_bytes <= self.chip.hbm_bytes

    @property
    def compute_bound_secs(self) -> float:
        """Least time of an update by the chip's peak rate of operations."""
        assert self.counts is not None
        assert self.chip is not None
        return self.counts.flops / self.chip.flops_per_sec

    @property
    def memory_bound_secs(self) -> float:
        """Least time of an update by the chip's peak memory bandwidth."""
        assert self.counts is not None
        assert self.chip is not None
        return self.counts.bytes_accessed / self.chip.hbm_bytes_per_sec

    @property
    def bound_secs(self) -> float:
        """The larger of the two bounds: no update can take less."""
        return max(self.compute_bound_secs, self.memory_bound_secs)

    @property
    def images_per_sec_bound(self) -> float:
        """Images per second of all chips together, at most."""
        return self.config.batch / self.bound_secs

    def __str__(self) -> str:
        """Returns the report that `mixer-jax plan` prints."""
        config, model = self.config, self.config.model
        lines = [
            f"{model.model_name}, {config.pp.crop} x {config.pp.crop} pixels, "
            f"{model.dtype}, remat {model.remat}",
            f"one update of {config.batch} images in {config.accum_steps} slice(s) on "
            f"{self.topology}: {self.chips} chips, data "
            f"{self.chips // config.mesh.fsdp} x fsdp {config.mesh.fsdp} "
            f"(compiled in {self.compile_secs:.0f} s)",
            "",
            "Memory of a chip",
            _row("parameters", self.params_bytes / 1e9, "GB"),
            _row("optimizer state", self.opt_state_bytes / 1e9, "GB"),
            _row("temporaries", self.temporary_bytes / 1e9, "GB"),
            _row("peak", self.peak_bytes / 1e9, "GB", self._verdict()),
        ]
        for values, peak_bytes in self.changes:
            text = " ".join(f"--config.{k}={v}" for k, v in values.items())
            fits = self.chip is not None and peak_bytes <= self.chip.hbm_bytes
            verdict = "fits" if fits else "does not fit either"
            lines.append(_row("tried", peak_bytes / 1e9, "GB", f"{verdict}: {text}"))
        if self.counts is not None:
            lines += ["", *self._work()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        if self.chip is None:
            return "of a memory whose size is not known"
        share = 100 * self.peak_bytes / self.chip.hbm_bytes
        verdict = "fits" if self.fits else "DOES NOT FIT"
        return f"{share:.0f} % of {self.chip.hbm_bytes / 1e9:.0f} GB: {verdict}"

    def _work(self) -> list[str]:
        assert self.counts is not None
        images = self.config.batch / self.chips
        lines = [
            "Work",
            _row("for each image", self.counts.flops / images / 1e9, "GFLOP"),
            _row("for each image", self.counts.bytes_accessed / images / 1e6, "MB"),
            _row("update, one chip", self.counts.flops / 1e12, "TFLOP"),
            _row("update, one chip", self.counts.bytes_accessed / 1e9, "GB"),
        ]
        lines += [
            _row(f"sent, {kind}", size / 1e6, "MB")
            for kind, size in self.counts.sent_bytes.items()
        ]
        if self.chip is None:
            return lines
        return [
            *lines,
            "",
            "Bounds by the chip's published peaks: no update takes less, most more",
            _row("compute", 1e3 * self.compute_bound_secs, "ms"),
            _row("memory", 1e3 * self.memory_bound_secs, "ms"),
            _row("at most", self.images_per_sec_bound, "images/s"),
        ]


def plan(
    config: Config,
    topology: str,
    num_classes: int = 1000,
    *,
    search: bool = True,
    tell: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Compiles the step that `config` describes, for `topology`, and reads it.

    XLA counts the body of a loop once. So a step that loops over the blocks is counted
    from its unrolled twin, and one that loops over slices of the batch from itself and
    from a twin whose loop's body holds more slices.

    Args:
      config: see configs/common.py; its dataset is not opened.
      topology: "local", these devices, or TPUs by generation and shape in chips, such
        as "v5e:2x4", "v4:2x2x2", "v5p:2x2x2" or "v6e:2x4".
      num_classes: of the dataset.
      search: if it does not fit, try what would.
      tell: called with a line when something long begins.

    Raises:
      ConfigError: the config contradicts itself, or the number of devices.
      PlanError: there is no such topology, or libtpu is not installed.
    """
    devices = _devices(topology)
    config = for_platform(config, devices[0].platform)
    chip = next((c for c in CHIPS.values() if c.device_kind == _kind(devices)), None)
    check_config(config)
    check_devices(config, len(devices))

    tell(f"compiling the step for {len(devices)} devices")
    step = _compile(config, devices, num_classes)
    counts = step.counts
    if counts is not None and config.model.scan_blocks:
        tell("compiling it with the blocks unrolled, to count")
        config_unrolled = _changed(config, {"model.scan_blocks": False})
        counts = _compile(config_unrolled, devices, num_classes).counts
    else:
        config_unrolled = config
    if counts is not None and config.accum_steps > 1:
        tell("compiling it with more slices in the loop, to count")
        unroll = next(n for n in range(2, 1 + config.accum_steps)
                      if config.accum_steps % n == 0)  # fmt: skip
        more = _compile(config_unrolled, devices, num_classes, unroll).counts
        if more is not None:
            slices = more.plus(counts, -1)  # unroll - 1 of them
            counts = counts.plus(slices, (config.accum_steps - 1) / (unroll - 1))
    result = Plan(
        config=config,
        topology=topology,
        chips=len(devices),
        chip=chip,
        params_bytes=step.params_bytes,
        opt_state_bytes=step.opt_state_bytes,
        temporary_bytes=step.temporary_bytes,
        peak_bytes=step.peak_bytes,
        compile_secs=step.compile_secs,
        counts=counts,
    )
    if search and result.fits is False:
        changes = _search(result, devices, num_classes, tell)
        result = dataclasses.replace(result, changes=changes)
    return result


# --- Compiling ---


@dataclasses.dataclass(frozen=True)
class _Step:
    """What the compiler says about one step; `counts` count a loop's body once."""

    params_bytes: int
    opt_state_bytes: int
    temporary_bytes: int
    peak_bytes: int
    compile_secs: float
    counts: Counts | None


def _devices(topology: str) -> list[Any]:
    if topology == "local":
        return jax.devices()
    generation = topology.partition(":")[0]
    if generation not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise PlanError(
            f"topology is {topology!r}; expected local, or one of {', '.join(CHIPS)} "
            "and a shape in chips, such as v5e:2x4 or v4:2x2x2."
        )
    for name, value in (
        ("TPU_SKIP_MDS_QUERY", "1"),  # there is no metadata server to ask
        ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),  # nor a chip to reserve
        ("TPU_MIN_LOG_LEVEL", "3"),
        ("TPU_STDERR_LOG_LEVEL", "3"),
    ):
        os.environ.setdefault(name, value)
    # A v4 chip has two cores, which JAX uses as one device.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        return list(
            topologies.get_topology_desc(topology, platform="tpu", **options).devices
        )
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        message = str(error).splitlines()[0]
        raise PlanError(
            f"{topology} is not to be had: {message}\nIs the extra installed, "
            'pip install "mixer-jax[tpu]", and does that TPU come in that shape?'
        ) from error


def _kind(devices: list[Any]) -> str:
    return devices[0].device_kind


def _compile(
    config: Config, devices: list[Any], num_classes: int, unroll: int = 1
) -> _Step:
    mesh = sharding.create_mesh(config.mesh.fsdp, devices)
    program = build_program(config, mesh, num_classes, unroll)
    state = program.abstract_state
    image_dtype = jnp.uint8 if config.pp.transfer == "uint8" else jnp.float32
    image_shape = (config.batch, config.pp.crop, config.pp.crop, 3)
    batch = {
        "image": jax.ShapeDtypeStruct(image_shape, image_dtype),
        "label": jax.ShapeDtypeStruct((config.batch,), jnp.int32),
    }
    rng = jax.eval_shape(lambda: jax.random.key(0))
    start = time.monotonic()
    lowered = program.train_step.lower(state, batch, rng)
    sizes = (_bytes_per_chip(state.params), _bytes_per_chip(state.opt_state))
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        peak_bytes = read_out_of_memory(str(error))
        if peak_bytes is None:
            raise
        temporaries = peak_bytes - sum(sizes)
        secs = time.monotonic() - start
        return _Step(*sizes, temporaries, peak_bytes, secs, None)
    secs = time.monotonic() - start
    memory = compiled.memory_analysis()
    peak_bytes = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    counts = Counts.read(compiled, len(devices))
    return _Step(*sizes, memory.temp_size_in_bytes, peak_bytes, secs, counts)


def _bytes_per_chip(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


# --- When it does not fit ---


def _changed(config: Config, values: dict[str, Any]) -> Config:
    config = copy.deepcopy(config)
    config.update_from_flattened_dict(values)
    return config


def _search(
    base: Plan, devices: list[Any], num_classes: int, tell: Callable[[str], None]
) -> tuple[tuple[dict[str, Any], int], ...]:
    """Tries remat, then fsdp, then more accum_steps, until the step fits."""
    assert base.chip is not None
    limit, chips, config = base.chip.hbm_bytes, base.chips, base.config
    state_bytes = base.params_bytes + base.opt_state_bytes
    values: dict[str, Any] = {}
    tried: list[tuple[dict[str, Any], int]] = []

    def fits(**change: Any) -> bool:
        values.update({key.replace("__", "."): value for key, value in change.items()})
        text = " ".join(f"{key}={value}" for key, value in values.items())
        tell(f"it needs more than {limit / 1e9:.0f} GB; trying {text}")
        step = _compile(_changed(config, values), devices, num_classes)
        tried.append((dict(values), step.peak_bytes))
        return step.peak_bytes <= limit

    if config.model.remat != "blocks" and fits(model__remat="blocks"):
        return tuple(tried)
    # Gradients are as large as parameters: together they should leave room.
    fsdp = config.mesh.fsdp
    while (
        2 * state_bytes * config.mesh.fsdp / fsdp > limit / 2
        and chips % (2 * fsdp) == 0
    ):
        fsdp *= 2
    if fsdp > config.mesh.fsdp and fits(mesh__fsdp=fsdp):
        return tuple(tried)
    accum_steps = 2 * config.accum_steps
    while config.batch % (accum_steps * chips) == 0:
        if fits(accum_steps=accum_steps):
            return tuple(tried)
        accum_steps *= 2
    if chips % (2 * fsdp) == 0:
        fits(mesh__fsdp=chips)
    return tuple(tried)


def _row(name: str, value: float, unit: str, note: str = "") -> str:
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"  {name:<20}{value:>10,.{min(digits, 3)}f} {unit:<9}{note}".rstrip()
