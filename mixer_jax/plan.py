"""A dry run: does a training step fit TPUs that you do not have, and what bounds it?

mixer-jax plan --config configs/b16.py --topology v5e:2x4

compiles the training step of a run ahead of time, with libtpu (the extra `tpu`), and
reads what the compiler reports. Nothing is computed, and no TPU is needed.
"""

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

from mixer_jax.data.sizes import as_size
from mixer_jax.hlo import count_traffic
from mixer_jax.run.chips import CHIPS, Chip, chip_of
from mixer_jax.run.config import check_config, check_devices, normalization
from mixer_jax.run.program import abstract_batch, build_program, for_devices
from mixer_jax.run.resolution import check_token_units
from mixer_jax.training import sharding
from mixer_jax.training.step import make_loss_and_grads

Config = Any  # an ml_collections.ConfigDict with the keys of configs/common.py
Progress = Callable[[str], None]  # is called with a line of text before a compilation


class PlanError(RuntimeError):
    """The topology is unknown, or what compiles for it is missing."""


@dataclasses.dataclass(frozen=True)
class Needs:
    """What one update needs of one chip; nan where it is not known."""

    params_bytes: float
    opt_state_bytes: float
    temporary_bytes: float = math.nan  # what XLA allocates for the rest of the step
    peak_bytes: float = math.nan  # arguments, results and temporaries; an upper bound
    flops: float = math.nan
    memory_bytes: float = math.nan  # that the instructions read and write in HBM
    network_bytes: float = math.nan  # that collectives send, and receive
    refusal: str = ""  # the compiler's sentence if something is too large to compile


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one update of a run needs, and on what."""

    config: Config  # with the platform's defaults in place of None
    topology: str  # such as "v5e:2x4", or "local"
    chips: int
    chip: Chip
    needs: Needs
    compile_secs: float  # how long this machine took to compile the step

    @property
    def fits(self) -> bool | None:
        """Whether the step fits the chip; None if the chip's memory is not known."""
        if math.isnan(self.chip.hbm_bytes):
            return None
        return self.needs.peak_bytes <= self.chip.hbm_bytes

    @property
    def bounds_secs(self) -> dict[str, float]:
        """Least time of an update by the chip's peak of operations, memory, network."""
        needs, chip = self.needs, self.chip
        return {
            "compute": needs.flops / chip.flops_per_sec,
            "memory": needs.memory_bytes / chip.hbm_bytes_per_sec,
            "network": needs.network_bytes / chip.network_bytes_per_sec,
        }

    @property
    def settings(self) -> dict[str, Any]:
        """The keys of the config that mixer_jax/plan_search.py chooses."""
        flat = {
            "model.remat": self.config.model.get("remat"),
            "accum_steps": self.config.accum_steps,
            "mesh.fsdp": self.config.mesh.fsdp,
        }
        return {key: value for key, value in flat.items() if value is not None}

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
            f"{config.model.get('dtype', '-')}, "
            f"remat {config.model.get('remat', '-')}",
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
        if needs.refusal:
            lines.append(f"\nThe work is not known. The compiler says: {needs.refusal}")
        else:
            images = config.batch / self.chips
            lines += [
                "\nWork of a chip",
                _row("operations", needs.flops / 1e12, "TFLOP"),
                _row("for each image", needs.flops / images / 1e9, "GFLOP"),
                _row("moved in memory", needs.memory_bytes / 1e9, "GB"),
                _row("sent to others", needs.network_bytes / 1e9, "GB"),
            ]
        if self.fits is None:
            lines.append(
                "\nNo bounds: mixer_jax/run/chips.py has no published figures for the "
                f"device {chip.device_kind!r}."
            )
        elif not needs.refusal:
            bounds = self.bounds_secs
            lines += [
                "\nBounds by the chip's published peaks: no update takes less time",
                *(_row(name, 1e3 * secs, "ms") for name, secs in bounds.items()),
                _row("at most", config.batch / max(bounds.values()), "images/s"),
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
    progress: Progress = lambda message: None,
) -> Plan:
    """Compiles the training step of `config` for `topology`, and reads what it needs.

    Args:
      config: see configs/common.py. Its dataset is not opened.
      topology: "local" for the devices of this machine, or TPUs by generation and shape
        in chips, such as "v5e:2x4", "v4:2x2x2", "v5p:2x2x2" or "v6e:2x4".
      num_classes: of the dataset.
      progress: called with a line of text before each compilation.

    Raises:
      ConfigError: the config contradicts itself, or the number of devices; or the run
        will take a field of the model from its file.
      PlanError: there is no such topology, or libtpu is not installed.
    """
    devices = devices_of(topology)
    check_config(config)
    check_token_units(config)
    check_devices(config, len(devices))
    config = for_devices(config, devices)

    def compile_with(text: str, one_turn: bool = False, **changes: Any) -> Needs:
        progress(text)
        changed = config.copy_and_resolve_references()
        changed.model.update(changes)
        return _compile(changed, devices, num_classes, one_turn)

    start = time.monotonic()
    needs = compile_with(f"compiling the step for {len(devices)} devices")
    result = Plan(
        config,
        topology,
        len(devices),
        chip_of(devices[0].device_kind),
        needs,
        compile_secs=time.monotonic() - start,
    )
    in_loops = config.accum_steps > 1 or config.model.get("scan_blocks", False)
    if not in_loops or needs.refusal:
        return result

    # XLA counts the body of a loop once. So the step is counted without a loop over its
    # blocks, and the other turns of a loop over slices by compiling one of them.
    unrolled = {"scan_blocks": False} if "scan_blocks" in config.model else {}
    counted = [(1, needs)]
    if result.fits is False:
        counted = [(1, Needs(0, 0))]  # nobody needs its work
    elif config.model.get("scan_blocks", False):
        text = "compiling it with scan_blocks=False, to count its work"
        counted = [(1, compile_with(text, **unrolled))]
    if config.accum_steps > 1 and result.fits is not False:
        text = "compiling one turn of the loop over slices, to count its work"
        # With SAM a step computes two gradients, each in a loop.
        turns = (config.accum_steps - 1) * (2 if config.sam_rho else 1)
        counted.append((turns, compile_with(text, one_turn=True, **unrolled)))
    work = {
        key: sum(turns * getattr(x, key) for turns, x in counted)
        for key in ("flops", "memory_bytes", "network_bytes")
    }
    refusal = next((x.refusal for _, x in counted if x.refusal), "")
    needs = dataclasses.replace(needs, **work, refusal=refusal)
    return dataclasses.replace(result, needs=needs)


def devices_of(topology: str) -> list[Any]:
    """Returns devices to compile for; for the argument and errors see `plan`."""
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
    rows = config.batch // config.accum_steps if one_turn else config.batch
    batch = abstract_batch(config, mesh, rows)
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
    sizes = (
        sharding.bytes_per_device(state.params),
        sharding.bytes_per_device(state.opt_state),
    )
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if error.error_code_string != "RESOURCE_EXHAUSTED":
            raise
        return Needs(*sizes, refusal=error.error_message.splitlines()[0])
    memory = compiled.memory_analysis()
    peak_bytes = (
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        - memory.alias_size_in_bytes
        + memory.temp_size_in_bytes
    )
    traffic = count_traffic(compiled.as_text())
    return Needs(
        *sizes,
        memory.temp_size_in_bytes,
        peak_bytes,
        compiled.cost_analysis()["flops"],
        traffic.memory_bytes,
        traffic.network_bytes,
    )
