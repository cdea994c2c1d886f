"""A run's forward pass and training step, on a batch that is on the devices."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mixer_jax.benchmark.matmul import matmuls
from mixer_jax.benchmark.report import Row
from mixer_jax.benchmark.timing import Spread, take_turns
from mixer_jax.data.preprocess import scale
from mixer_jax.data.sizes import as_size, size_text
from mixer_jax.run.config import (
    Config,
    ConfigError,
    check_config,
    flatten,
    normalization,
)
from mixer_jax.run.program import (
    Program,
    abstract_batch,
    build_program,
    step_rng,
)
from mixer_jax.run.resolution import check_token_units
from mixer_jax.training import sharding
from mixer_jax.variants import get_variant


def sweep(
    config: Config,
    variants: Sequence[str] = (),
    batches: Sequence[int] = (),
    dtypes: Sequence[str] = (),
    sizes: Sequence[int] = (),
) -> list[Config]:
    """Returns the configs to measure: `config` with each combination of values.

    Args:
      config: see configs/common.py.
      variants: of the model, such as "S/32". Empty, here and below: the config's.
      batches: images of an update, in one slice.
      dtypes: of the activations.
      sizes: of the images, in pixels.

    Raises:
      ConfigError: there is no such variant; or one of them contradicts itself.
    """
    models = [_fields_of(config, name) for name in variants]
    # A slice is what is computed at a time. The images of tests are not made here.
    axes: list[list[dict[str, Any]]] = [
        models,
        [{"batch": x, "batch_eval": x, "accum_steps": 1} for x in batches],
        [{"model.dtype": x} for x in dtypes],
        [{"pp.crop": x, "pp.resize": x} for x in sizes],
    ]
    found = []
    for changes in itertools.product(*(axis or [{}] for axis in axes)):
        changed = config.copy_and_resolve_references()
        for change in changes:
            changed.update_from_flattened_dict(change)
        check_config(changed)
        check_token_units(changed)
        found.append(changed)
    return found


def _fields_of(config: Config, name: str) -> dict[str, Any]:
    try:
        sizes = get_variant(name)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    fields = flatten({**vars(sizes), "patches": sizes.patches._asdict()})
    fields["model_name"] = f"Mixer-{name.removeprefix('Mixer-').replace('/', '_')}"
    # A fork may do without a field.
    known = flatten(config.model.to_dict())
    return {f"model.{key}": x for key, x in fields.items() if key in known}


def benchmark_step(
    configs: Sequence[Config], num_classes: int, repeats: int
) -> Iterator[Row]:
    """Measures the evaluation's step, "forward", and the training step of each config.

    The share of the peak counts the operations of the model: what a step computes a
    second time to save memory is left out. The peak is of the fastest product of large
    matrices, measured in turn with the steps.

    Args:
      configs: from `sweep`; for the devices here, see
        mixer_jax.run.program.check_run.
      num_classes: of the model.
      repeats: measurements of each.

    Yields:
      A row for each config and kind of step; one for a config that needs more memory
      than there is.
    """
    for config in configs:
        mesh = sharding.create_mesh(config.mesh.fsdp)
        with jax.set_mesh(mesh):
            try:
                yield from _rows(config, mesh, num_classes, repeats)
            except jax.errors.JaxRuntimeError as error:
                if error.error_code_string != "RESOURCE_EXHAUSTED":
                    raise
                yield _names(config) | {"step": "out of memory"}


def _rows(config: Config, mesh: Mesh, num_classes: int, repeats: int) -> Iterator[Row]:
    calls = step_calls(config, build_program(config, mesh, num_classes), mesh)
    products = matmuls(mesh, config.model.get("dtype", "float32"))
    turns = calls | {f"matmul {size}": call for size, (call, _) in products.items()}
    found = take_turns(turns, jax.block_until_ready, repeats)
    peak, fastest = max(
        (flops / found[f"matmul {size}"].spread.median, size)
        for size, (_, flops) in products.items()
    )
    of_peak = products[fastest][1]
    work = model_flops(config, mesh, num_classes)
    for name in calls:
        timing, flops = found[name], work[name]
        share = None
        if flops:
            by_turn = timing.over(found[f"matmul {fastest}"])
            share = Spread(
                flops / of_peak / by_turn.median,
                flops / of_peak / by_turn.most,
                flops / of_peak / by_turn.least,
                by_turn.count,
            )
        yield _names(config) | {
            "step": name,
            "secs": timing.spread,
            "images/s": timing.per_sec(config.batch),
            "GFLOP": flops and flops / 1e9,
            "share of peak": share,
            "peak GFLOP/s": peak / 1e9,
        }


def _names(config: Config) -> dict[str, Any]:
    return {
        "model": config.model.get("model_name") or "-",
        "pixels": size_text(as_size(config.pp.crop)),
        "dtype": str(config.model.get("dtype", "-")),
        "batch": config.batch,
    }


def step_calls(
    config: Config, program: Program, mesh: Mesh
) -> dict[str, Callable[[], Any]]:
    """Returns the steps of a program as functions without arguments, by name."""
    state = program.init(jax.random.key(config.seed))
    # The training step gives away its state, and so the parameters.
    params = jax.tree.map(jnp.copy, state.params)
    batch = random_batch(config, program, mesh)
    labelled = {key: batch[key] for key in ("image", "label")}
    rng = step_rng(config, mesh)

    def train() -> Any:
        nonlocal state
        state, metrics = program.train_step(state, labelled, rng)
        return metrics

    return {"forward": lambda: program.eval_step(params, batch), "train": train}


def random_batch(config: Config, program: Program, mesh: Mesh) -> dict[str, jax.Array]:
    """Returns a batch of noise on the devices, with classes as labels."""
    rng = np.random.default_rng(config.seed)
    rows = len(sharding.local_rows(mesh, config.batch))
    shape = rows, *as_size(config.pp.crop), 3
    images: np.ndarray = rng.integers(256, size=shape, dtype=np.uint8)
    if config.pp.transfer == "float32":
        images = scale(images, *normalization(config))
    classes = program.model.num_classes or 1
    batch = {
        "image": images,
        "label": rng.integers(classes, size=rows).astype(np.int32),
        "mask": np.ones(rows, np.float32),
    }
    return sharding.shard_batch(mesh, batch)


def model_flops(
    config: Config, mesh: Mesh, num_classes: int
) -> dict[str, float | None]:
    """Returns the floating-point operations of a step over all devices, by its name.

    XLA counts the body of a loop once, and what is computed a second time as well. So
    the steps are counted without loops and without rematerialization. None where the
    backend does not count.
    """
    plain = config.copy_and_resolve_references()
    plain.accum_steps = 1
    for key, value in {"scan_blocks": False, "remat": "none"}.items():
        if key in plain.model:
            plain.model[key] = value
    program = build_program(plain, mesh, num_classes)
    state = program.abstract_state
    batch = abstract_batch(plain, mesh, plain.batch)
    mask = jax.ShapeDtypeStruct((plain.batch,), jnp.float32)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    lowered = {
        "forward": program.eval_step.lower(state.params, batch | {"mask": mask}),
        "train": program.train_step.lower(state, batch, rng),
    }
    return {name: (x.cost_analysis() or {}).get("flops") for name, x in lowered.items()}
