"""Looks for the fastest remat, accum_steps and fsdp of a training step."""

import math
from collections.abc import Sequence
from typing import Any

from mixer_jax.plan import Config, Plan, PlanError, Progress, devices_of, plan
from mixer_jax.run.chips import chip_of


def find_best(
    config: Config,
    topology: str,
    num_classes: int = 1000,
    *,
    known: Sequence[Plan] = (),
    progress: Progress = lambda message: None,
) -> list[Plan]:
    """Tries remat, accum_steps and fsdp; see `fastest` for the best of them.

    Nothing is compiled that cannot be the fastest. A step in one slice that computes
    nothing twice (remat "none") has the fewest operations, whatever fsdp is. So:

    1. It is tried first, with the config's fsdp.
    2. While a step does not fit, the state is split, then the slices are halved: both
       cost less than to compute the blocks a second time, which comes last.
    3. A step that fits and is bound by operations is the fastest. One that is bound by
       memory is tried with remat "blocks" and with the state over all chips; one that
       is bound by the network with the state over all chips, and on each.

    Args:
      config: see `plan`. Its remat, accum_steps and fsdp are only where to start.
      topology: see `plan`.
      num_classes: see `plan`.
      known: plans of this config and topology that need not be made again.
      progress: see `plan`.

    Returns:
      The plans in the order in which they were tried.

    Raises:
      ConfigError: see `plan`.
      PlanError: see `plan`; or there are no published figures for the devices.
    """
    devices = devices_of(topology)
    chips, kind = len(devices), devices[0].device_kind
    if math.isnan(chip_of(kind).hbm_bytes):
        raise PlanError(
            f"mixer_jax/run/chips.py has no published figures for the device {kind!r}, "
            "so nothing can be compared."
        )
    tried: list[Plan] = []
    settings = {"accum_steps": 1, "mesh.fsdp": config.mesh.fsdp}
    if "remat" in config.model:
        settings["model.remat"] = "none"

    def attempt(**changes: Any) -> Plan:
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(settings | changes)
        flags = " ".join(f"{key}={x}" for key, x in (settings | changes).items())
        found = next((x for x in known if x.settings == settings | changes), None)
        if found is None:
            found = plan(
                changed,
                topology,
                num_classes,
                progress=lambda text: progress(f"{flags}: {text}"),
            )
        tried.append(found)
        return found

    found = attempt()
    for changes in _savings(found, settings):
        if found.fits:
            break
        settings |= changes
        found = attempt()
    if not found.fits:
        return tried
    bounds = found.bounds_secs
    slowest = max(bounds, key=lambda name: bounds[name])
    if slowest == "memory" and settings.get("model.remat") == "none":
        attempt(**{"model.remat": "blocks"})
    others = {"memory": {chips}, "network": {1, chips}}.get(slowest, set())
    for fsdp in sorted(others - {settings["mesh.fsdp"]}):
        attempt(**{"mesh.fsdp": fsdp})
    return tried


def fastest(tried: Sequence[Plan]) -> Plan | None:
    """Returns the plan with the lowest bound of those that fit, None if none does."""
    return min(
        (x for x in tried if x.fits and not x.needs.refusal),
        key=lambda x: max(x.bounds_secs.values()),
        default=None,
    )


def compare(tried: Sequence[Plan]) -> str:
    """Returns a table of plans, and the flags of the fastest."""
    lines = [f"{'peak GB':>8} {'bound ms':>9}  tried"]
    for x in tried:
        flags = " ".join(f"{key}={value}" for key, value in x.settings.items())
        bounds = x.bounds_secs
        name = max(bounds, key=lambda name: bounds[name])
        note = f" (bound by {name})" if x.fits else " (does not fit)"
        peak, bound = (
            "unknown" if math.isnan(value) else f"{value:.{digits}f}"
            for value, digits in (
                (x.needs.peak_bytes / 1e9, 2),
                (1e3 * bounds[name], 1),
            )
        )
        lines.append(f"{peak:>8} {bound:>9}  {flags}{note}")
    if best := fastest(tried):
        flags = " ".join(f"--config.{key}={x}" for key, x in best.settings.items())
        return "\n".join([*lines, f"\nThe fastest that fits: {flags}"])
    return "\n".join([*lines, "\nNothing fits."])


def _savings(first: Plan, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns changes that save memory, one after the other, after the first plan."""
    needs, hbm_bytes, chips = first.needs, first.chip.hbm_bytes, first.chips
    state_bytes = needs.params_bytes + needs.opt_state_bytes
    # The state and the gradients, which are about as large, should take half at most.
    fsdp, ways = settings["mesh.fsdp"], 1
    while 2 * state_bytes / ways > hbm_bytes / 2 and chips % (2 * ways * fsdp) == 0:
        ways *= 2
    changes: list[dict[str, Any]] = []
    if ways > 1:
        changes.append({"mesh.fsdp": ways * fsdp})
    slices = [
        x for x in (2**i for i in range(1, 32)) if first.config.batch % (x * chips) == 0
    ]
    # A slice of half the images has half the temporaries: those that cannot fit are
    # passed over, if the compiler says how large the whole is.
    room = hbm_bytes - 2 * state_bytes / ways
    changes += [
        {"accum_steps": x}
        for x in slices
        if x == slices[-1] or not needs.temporary_bytes / x > room
    ]
    if "model.remat" in settings:
        changes.append({"model.remat": "blocks"})
    if chips > ways * fsdp:
        changes.append({"mesh.fsdp": chips})
    return changes
