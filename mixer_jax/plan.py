"""A dry run: does a training step fit TPUs that you do not have, and what bounds it?

mixer-jax plan --config configs/b16.py --topology v5e:2x4

compiles the training step of a run ahead of time, with libtpu (the extra `tpu`), and
reads what the compiler reports. Nothing is computed, and no TPU is needed.
"""

import dataclasses
import itertools
import math
import operator
import os
import re
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from mixer_jax.data.sizes import as_size
from mixer_jax.run.config import (
    check_config,
    check_devices,
    for_platform,
    normalization,
)
from mixer_jax.run.program import build_program
from mixer_jax.run.resolution import check_token_units
from mixer_jax.training import sharding
from mixer_jax.training.step import make_loss_and_grads

Config = Any  # an ml_collections.ConfigDict with the keys of configs/common.py


@dataclasses.dataclass(frozen=True)
class Chip:
    """Published figures of a chip; nan where there are none."""

    device_kind: str  # JAX's name for it
    hbm_bytes: float = math.nan
    flops_per_sec: float = math.nan  # peak of matrix products in bfloat16
    hbm_bytes_per_sec: float = math.nan


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
class Needs:
    """What one update needs of one chip; nan where the compiler gives no figure."""

    params_bytes: float
    opt_state_bytes: float
    temporary_bytes: float = math.nan  # what XLA allocates for the rest of the step
    peak_bytes: float = math.nan  # arguments, results and temporaries; an upper bound
    flops: float = math.nan
    bytes_accessed: float = math.nan  # that the instructions read and write in memory
    refusal: str = ""  # the compiler's sentence if something is too large to compile

    def fits(self, chip: Chip) -> bool | None:
        """Whether the chip's memory holds the peak; None if its size is not known."""
        return None if math.isnan(chip.hbm_bytes) else self.peak_bytes <= chip.hbm_bytes


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one update of a run needs, and on what."""

    config: Config  # with the platform's defaults in place of None
    topology: str  # such as "v5e:2x4", or "local"
    chips: int
    chip: Chip
    needs: Needs
    compile_secs: float  # how long this machine took to compile the step
    # If the step does not fit: which changes of the config were tried, each with those
    # before it, and what the step then needs.
    tried: tuple[tuple[dict[str, Any], Needs], ...] = ()

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the chip; None if the chip's memory is not known."""
        return self.needs.fits(self.chip)

    @property
    def bounds_secs(self) -> tuple[float, float]:
        """Least time of an update by the chip's peak of operations, and of memory."""
        return (
            self.needs.flops / self.chip.flops_per_sec,
            self.needs.bytes_accessed / self.chip.hbm_bytes_per_sec,
        )

    def __str__(self) -> str:
        """Returns the report that `mixer-jax plan` prints."""
        config, chip, needs = self.config, self.chip, self.needs
        verdict = "fits" if self.fits else "DOES NOT FIT"
        if self.fits is None:
            verdict = "whether it fits is not known"
        elif not math.isnan(needs.peak_bytes):
            share = 100 * needs.peak_bytes / chip.hbm_bytes
            verdict = f"{share:.0f} % of {chip.hbm_bytes / 1e9:.0f} GB: {verdict}"
        lines = [
            f"{config.model.model_name}, "
            f"{' x '.join(map(str, as_size(config.pp.crop)))} pixels, "
            f"{config.model.dtype}, remat {config.model.remat}",
            f"one update of {config.batch} images in {config.accum_steps} slice(s) on "
            f"{self.topology}: {self.chips} chips, data "
            f"{self.chips // config.mesh.fsdp} x fsdp {config.mesh.fsdp} "
            f"(compiled in {self.compile_secs:.0f} s)",
            "\nMemory of a chip",
            _row("parameters", needs.params_bytes / 1e9, "GB"),
            _row("optimizer state", needs.opt_state_bytes / 1e9, "GB"),
            _row("temporaries", needs.temporary_bytes / 1e9, "GB"),
            _row("peak", needs.peak_bytes / 1e9, "GB", verdict),
        ]
        for changes, changed in self.tried:
            note = "fits: " if changed.fits(chip) else "does not fit either: "
            note += " ".join(f"--config.{key}={x}" for key, x in changes.items())
            lines.append(_row("tried", changed.peak_bytes / 1e9, "GB", note))
        if needs.refusal:
            lines.append(f"\nThe work is not known. The compiler says: {needs.refusal}")
        else:
            images = config.batch / self.chips
            lines += [
                "\nWork",
                _row("for each image", needs.flops / images / 1e9, "GFLOP"),
                _row("for each image", needs.bytes_accessed / images / 1e6, "MB"),
                _row("update, one chip", needs.flops / 1e12, "TFLOP"),
                _row("update, one chip", needs.bytes_accessed / 1e9, "GB"),
            ]
        if self.fits is None:
            lines.append(
                "\nNo bounds: mixer_jax/plan.py has no published figures for the "
                f"device {chip.device_kind!r}."
            )
        elif not needs.refusal:
            lines += [
                "\nBounds by the chip's published peaks: no update takes less time",
                _row("compute", 1e3 * self.bounds_secs[0], "ms"),
                _row("memory", 1e3 * self.bounds_secs[1], "ms"),
                _row("at most", config.batch / max(self.bounds_secs), "images/s"),
            ]
        return "\n".join(lines)


def _row(name: str, value: float, unit: str, note: str = "") -> str:
    if math.isnan(value):
        return f"  {name:<20}{'unknown':>10} {'':<9}{note}".rstrip()
    digits = max(0, 2 - math.floor(math.log10(value))) if value > 0 else 0
    return f"  {name:<20}{value:>10,.{min(digits, 3)}f} {unit:<9}{note}".rstrip()


def plan(
    config: Config,
    topology: str,
    num_classes: int = 1000,
    *,
    search: bool = True,
    progress: Callable[[str], None] = lambda message: None,
) -> Plan:
    """Compiles the training step of `config` for `topology`, and reads what it needs.

    Args:
      config: see configs/common.py. Its dataset is not opened.
      topology: "local" for the devices of this machine, or TPUs by generation and shape
        in chips, such as "v5e:2x4", "v4:2x2x2", "v5p:2x2x2" or "v6e:2x4".
      num_classes: of the dataset.
      search: if the step does not fit, try changes of the config until it does.
      progress: called with a line of text before each compilation.

    Raises:
      ConfigError: the config contradicts itself, or the number of devices; or the run
        will take a field of the model from its file.
      PlanError: there is no such topology, or libtpu is not installed.
    """
    devices = _devices(topology)
    check_config(config)
    check_token_units(config)
    config = for_platform(config, devices[0].platform)
    kind = devices[0].device_kind
    chip = next((x for x in CHIPS.values() if x.device_kind == kind), Chip(kind))
    check_devices(config, len(devices))

    def compile_with(
        changes: dict[str, Any], text: str, one_turn: bool = False
    ) -> Needs:
        progress(text)
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(changes)
        return _compile(changed, devices, num_classes, one_turn)

    start = time.monotonic()
    needs = compile_with({}, f"compiling the step for {len(devices)} devices")
    compile_secs = time.monotonic() - start

    # XLA counts the body of a loop once. So the step is counted without a loop over its
    # blocks, and the other turns of a loop over slices by compiling one of them.
    unrolled = {"model.scan_blocks": False}
    counted = [(1, needs)]
    if config.model.scan_blocks and not needs.refusal:
        text = "compiling it with scan_blocks=False, to count its work"
        counted = [(1, compile_with(unrolled, text))]
    if config.accum_steps > 1 and not needs.refusal:
        text = "compiling one turn of the loop over slices, to count its work"
        # With SAM a step computes two gradients, each in a loop.
        turns = (config.accum_steps - 1) * (2 if config.sam_rho else 1)
        counted.append((turns, compile_with(unrolled, text, one_turn=True)))
    needs = dataclasses.replace(
        needs,
        flops=sum(turns * x.flops for turns, x in counted),
        bytes_accessed=sum(turns * x.bytes_accessed for turns, x in counted),
        refusal=next((x.refusal for _, x in counted if x.refusal), ""),
    )

    tried: list[tuple[dict[str, Any], Needs]] = []
    if search and needs.fits(chip) is False:
        for changes in _changes_to_try(config, needs, chip, len(devices)):
            flags = " ".join(f"{key}={value}" for key, value in changes.items())
            text = f"it needs more than {chip.hbm_bytes / 1e9:.0f} GB; trying {flags}"
            tried.append((changes, compile_with(changes, text)))
            if tried[-1][1].fits(chip):
                break
    return Plan(config, topology, len(devices), chip, needs, compile_secs, tuple(tried))


def _devices(topology: str) -> list[Any]:
    if topology == "local":
        return jax.devices()
    generation = topology.partition(":")[0]
    if generation not in CHIPS or not re.fullmatch(r"\w+:\d+(x\d+){1,2}", topology):
        raise PlanError(
            f"topology is {topology!r}; expected local, or one of {', '.join(CHIPS)} "
            "and a shape in chips, such as v5e:2x4 or v4:2x2x2."
        )
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # nor a chip to reserve
    os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TPU_STDERR_LOG_LEVEL", "3")
    # A v4 chip has two cores, which JAX uses as one device.
    options = {"chip_config_name": "megacore"} if generation == "v4" else {}
    try:
        found = topologies.get_topology_desc(topology, platform="tpu", **options)
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        raise PlanError(
            f"{topology} is not available: {str(error).splitlines()[0]}\n"
            'Is the extra installed, pip install "mixer-jax[tpu]", and does that TPU '
            "come in that shape?"
        ) from error
    return list(found.devices)


def _compile(
    config: Config, devices: list[Any], num_classes: int, one_turn: bool = False
) -> Needs:
    """Compiles the training step, or one turn of its loop over slices of the batch."""
    mesh = sharding.create_mesh(config.mesh.fsdp, devices)
    program = build_program(config, mesh, num_classes)
    state = program.abstract_state
    on_batch = sharding.batch_sharding(mesh)
    rows = config.batch // config.accum_steps if one_turn else config.batch
    shape = (rows, *as_size(config.pp.crop), 3)
    dtype = jnp.uint8 if config.pp.transfer == "uint8" else jnp.float32
    batch = {
        "image": jax.ShapeDtypeStruct(shape, dtype, sharding=on_batch),
        "label": jax.ShapeDtypeStruct((rows,), jnp.int32, sharding=on_batch),
    }
    rng = jax.eval_shape(lambda: jax.random.key(0))
    if one_turn:
        mean, std = normalization(config)
        loss_and_grads = make_loss_and_grads(
            program.model, program.loss_fn, mean=mean, std=std
        )
        lowered: Any = jax.jit(
            lambda total, *args: jax.tree.map(jnp.add, total, loss_and_grads(*args)[1]),
            out_shardings=sharding.state_shardings(mesh, state.params),
            donate_argnums=0,
            compiler_options=sharding.compiler_options(mesh),
        ).lower(state.params, state.params, batch, rng)  # total has params' shapes
    else:
        lowered = program.train_step.lower(state, batch, rng)
    sizes = _bytes_per_chip(state.params), _bytes_per_chip(state.opt_state)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if error.error_code_string != "RESOURCE_EXHAUSTED":
            raise
        return Needs(*sizes, refusal=error.error_message.splitlines()[0])
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    peak_bytes = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    work = cost["flops"], cost["bytes accessed"]
    return Needs(*sizes, memory.temp_size_in_bytes, peak_bytes, *work)


def _bytes_per_chip(tree: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
        for x in jax.tree.leaves(tree)
    )


def _changes_to_try(
    config: Config, needs: Needs, chip: Chip, chips: int
) -> Iterable[dict[str, Any]]:
    """Returns changes of the config that save memory, each with those before it."""
    # The state and the gradients, which are about as large, should take half at most.
    state_bytes = (needs.params_bytes + needs.opt_state_bytes) * config.mesh.fsdp
    fsdp = config.mesh.fsdp
    while 2 * state_bytes / fsdp > chip.hbm_bytes / 2 and chips % (2 * fsdp) == 0:
        fsdp *= 2
    changes: list[dict[str, Any]] = []
    if config.model.remat != "blocks":
        changes.append({"model.remat": "blocks"})
    if fsdp > config.mesh.fsdp:
        changes.append({"mesh.fsdp": fsdp})
    accum_steps = 2 * config.accum_steps
    while config.batch % (accum_steps * chips) == 0:
        changes.append({"accum_steps": accum_steps})
        accum_steps *= 2
    if chips % (2 * fsdp) == 0:
        changes.append({"mesh.fsdp": chips})
    return itertools.accumulate(changes, operator.or_)
