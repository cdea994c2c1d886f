"""Times a forward pass and a training step against other programs, in one process.

    pip install -e ".[bench]"
    python benchmarks/peers.py

The programs take turns on the same device, with the same sizes, batch and update:
momentum SGD on a gradient that is clipped to norm 1.

- ours: what `train.py` compiles, from uint8 images and integer labels;
- naive: the model and the step written down as in the original program, from float32
  images and one-hot labels, with the axes swapped around the token-mixing Dense layers;
- timm, and timm compiled with torch.compile.

The ratios compare turn by turn, so that other work on the machine falls on all alike;
above 1 ours is faster. `cpu s` is processor time of all threads. The share of the peak
is of the fastest large matrix product of the same dtype, which takes turns too. At the
start the naive forward pass and update are compared with ours, from the same
parameters.
"""

import argparse
import functools
import os
import pathlib
import sys
from collections.abc import Callable
from typing import Any

# PyTorch needs room on a GPU too.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
sys.path.append(str(pathlib.Path(__file__).parents[1]))  # for configs

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from configs import common
from mixer_jax.benchmark.matmul import matmuls
from mixer_jax.benchmark.step import model_flops
from mixer_jax.benchmark.timing import LEAST_REPEATS, Timing, take_turns
from mixer_jax.cli.app import print_table
from mixer_jax.run.config import for_platform
from mixer_jax.run.program import build_program, step_rng
from mixer_jax.training import sharding
from mixer_jax.training.step import to_model_input
from mixer_jax.variants import Variant, get_variant

NUM_CLASSES = 1000
RATE, MOMENTUM, MAX_NORM = 0.03, 0.9, 1.0
TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}  # of the norms of logits and update

PEERS = ("naive", "timm", "timm compiled")
MODES = ("forward", "train")

Call = Callable[[], Any]


class NaiveMlp(nn.Module):
    """Dense, GELU, Dense over the last axis."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., d] to [..., d]."""
        y = nn.gelu(nn.Dense(self.width, dtype=self.dtype)(x))
        return nn.Dense(x.shape[-1], dtype=self.dtype)(y)


class NaiveBlock(nn.Module):
    """Both mixings, each with its residual branch."""

    sizes: Variant
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Mixes [batch, tokens, channels]."""
        sizes = self.sizes
        y = jnp.swapaxes(nn.LayerNorm(dtype=self.dtype)(x), 1, 2)
        y = NaiveMlp(sizes.tokens_mlp_dim, self.dtype, name="token_mixing")(y)
        x = x + jnp.swapaxes(y, 1, 2)
        y = nn.LayerNorm(dtype=self.dtype)(x)
        y = NaiveMlp(sizes.channels_mlp_dim, self.dtype, name="channel_mixing")(y)
        return x + y


class NaiveMixer(nn.Module):
    """The model as the original writes it, with the published names."""

    sizes: Variant
    dtype: Any

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """Maps float32 images [batch, height, width, 3] to logits."""
        patch, width = self.sizes.patches.size, self.sizes.hidden_dim
        x = nn.Conv(width, patch, strides=patch, dtype=self.dtype, name="stem")(images)
        x = x.reshape(x.shape[0], -1, width)
        for i in range(self.sizes.num_blocks):
            x = NaiveBlock(self.sizes, self.dtype, name=f"MixerBlock_{i}")(x)
        x = nn.LayerNorm(dtype=self.dtype, name="pre_head_layer_norm")(x)
        return nn.Dense(NUM_CLASSES, name="head")(jnp.mean(x, axis=1))


def our_config(args: argparse.Namespace) -> Any:
    """Returns the config of a run that makes the same steps."""
    config = common.get_finetune_config(args.model, None)
    config.update_from_flattened_dict(
        {
            "pp.crop": args.size,
            "pp.resize": args.size,
            "batch": args.batch,
            "batch_eval": args.batch,
            "accum_steps": 1,
            "base_lr": RATE,
            "warmup_steps": 0,
            "decay_type": "constant",
            "grad_norm_clip": MAX_NORM,
            "model.dtype": args.dtype,
            "model.remat": "none",
        }
    )
    return for_platform(config, jax.devices()[0].platform)


def our_calls(
    args: argparse.Namespace, mesh: Any
) -> tuple[dict[str, Call], Any, Callable[[], Any]]:
    """Returns our forward pass and step, the parameters, and what gives the state."""
    config = our_config(args)
    program = build_program(config, mesh, NUM_CLASSES)
    images, labels = batch_of(args)
    batch = sharding.shard_batch(mesh, {"image": images, "label": labels})
    state = program.init(jax.random.key(0))
    params = random_head(state.params)
    state = state.replace(params=params)
    rng = step_rng(config, mesh)

    @jax.jit
    def forward(params: Any, images: jax.Array) -> Any:
        return program.model.apply(
            {"params": params}, to_model_input(images), train=False
        )

    def train() -> Any:
        nonlocal state
        state, metrics = program.train_step(state, batch, rng)
        return metrics

    kept = jax.tree.map(jnp.copy, params)  # the step donates its state
    calls = {"forward": lambda: forward(kept, batch["image"]), "train": train}
    return calls, kept, lambda: state


def naive_calls(args: argparse.Namespace, params: Any) -> tuple[dict[str, Call], Any]:
    """Returns the same of the naive model, and a function for its parameters."""
    model = NaiveMixer(get_variant(args.model), jnp.dtype(args.dtype))
    tx = optax.chain(
        optax.clip_by_global_norm(MAX_NORM),
        optax.sgd(RATE, momentum=MOMENTUM, accumulator_dtype="bfloat16"),
    )
    images, labels = batch_of(args)
    images = jax.device_put(images.astype(np.float32) / 127.5 - 1)
    one_hot = jax.device_put(np.eye(NUM_CLASSES, dtype=np.float32)[labels])

    @jax.jit
    def forward(params: Any, images: jax.Array) -> Any:
        return model.apply({"params": params}, images)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Any, opt_state: Any, images: jax.Array, labels: jax.Array) -> Any:
        def loss_of(params: Any) -> jax.Array:
            logits: Any = model.apply({"params": params}, images)
            return -jnp.mean(jnp.sum(labels * jax.nn.log_softmax(logits), axis=-1))

        loss, grads = jax.value_and_grad(loss_of)(params)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, loss

    trained = jax.tree.map(jnp.copy, params)
    opt_state = tx.init(trained)

    def train() -> Any:
        nonlocal trained, opt_state
        trained, opt_state, loss = step(trained, opt_state, images, one_hot)
        return loss

    return {"forward": lambda: forward(params, images), "train": train}, lambda: trained


def timm_calls(args: argparse.Namespace, compiled: bool) -> dict[str, Call]:
    """Returns the same of timm's model."""
    import timm.models.mlp_mixer
    import torch
    from torch.nn import functional

    sizes = get_variant(args.model)
    device = "cuda" if jax.devices()[0].platform == "gpu" else "cpu"
    if device == "cuda":
        torch.set_float32_matmul_precision("high")  # TensorFloat-32, as JAX
    torch.manual_seed(0)
    model = timm.models.mlp_mixer.MlpMixer(
        NUM_CLASSES,
        args.size,
        patch_size=sizes.patches.size[0],
        num_blocks=sizes.num_blocks,
        embed_dim=sizes.hidden_dim,
        mlp_ratio=tuple(
            x / sizes.hidden_dim for x in (sizes.tokens_mlp_dim, sizes.channels_mlp_dim)
        ),
    )
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    model = model.to(device, memory_format=layout)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    images, labels = batch_of(args)
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    inputs = pixels.to(device).contiguous(memory_format=layout)
    classes = torch.from_numpy(labels).long().to(device)
    run = torch.compile(model) if compiled else model
    cast = functools.partial(
        torch.autocast, device, torch.bfloat16, enabled=args.dtype == "bfloat16"
    )

    def end() -> Any:
        if device == "cpu":
            return None
        event = torch.cuda.Event()
        event.record()
        return event

    @torch.inference_mode()
    def forward() -> Any:
        model.eval()
        with cast():
            run(inputs)
        return end()

    def train() -> Any:
        model.train()
        with cast():
            loss = functional.cross_entropy(run(inputs), classes)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return end()

    return {"forward": forward, "train": train}


def batch_of(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Returns uint8 images and int32 labels, the same for all."""
    rng = np.random.default_rng(0)
    shape = args.batch, args.size, args.size, 3
    labels = rng.integers(NUM_CLASSES, size=args.batch)
    return rng.integers(256, size=shape, dtype=np.uint8), labels.astype(np.int32)


def random_head(params: Any) -> Any:
    """Returns parameters whose head is not zero: logits of zero would always agree."""
    kernel = params["head"]["kernel"]
    draw = jax.random.normal(jax.random.key(1), kernel.shape, kernel.dtype)
    return params | {"head": params["head"] | {"kernel": draw / kernel.shape[0] ** 0.5}}


def wait(result: Any) -> None:
    """Waits for a result of JAX or PyTorch."""
    if hasattr(result, "synchronize"):  # an event of PyTorch on a GPU
        result.synchronize()
    else:  # on CPU PyTorch returns when it is done
        jax.block_until_ready(result)


def check_equal(args: argparse.Namespace, what: str, ours: Any, naive: Any) -> None:
    """Exits if two trees of arrays differ by more than rounding."""
    difference = optax.global_norm(jax.tree.map(jnp.subtract, ours, naive))
    error = float(difference / optax.global_norm(naive))
    print(f"{what}: naive and ours differ by {error:.1e} of its norm")
    if not error <= TOLERANCE[args.dtype]:
        sys.exit(f"They must agree to {TOLERANCE[args.dtype]}: this compares nothing.")


def main() -> None:
    """Checks, measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="B/16", help="a variant")
    parser.add_argument("--size", type=int, default=224, help="of images, in pixels")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--channels_last", action="store_true", help="of timm's images")
    for flag, known in (("--peers", PEERS), ("--modes", MODES)):
        parser.add_argument(flag, nargs="+", choices=known, default=known)
    args = parser.parse_args()
    if args.repeats < LEAST_REPEATS:
        parser.error(f"--repeats is {args.repeats}; at least {LEAST_REPEATS}")

    mesh = sharding.create_mesh(devices=jax.devices()[:1])
    ours, params, our_state = our_calls(args, mesh)
    naive, naive_params = naive_calls(args, params)
    check_equal(args, "forward", ours["forward"](), naive["forward"]())
    wait((ours["train"](), naive["train"]()))
    moved, naive_moved = (
        jax.tree.map(jnp.subtract, x, params)
        for x in (our_state().params, naive_params())
    )
    check_equal(args, "update", moved, naive_moved)

    calls = {"ours": ours, "naive": naive}
    if "timm" in args.peers:
        calls["timm"] = timm_calls(args, compiled=False)
    if "timm compiled" in args.peers:
        calls["timm compiled"] = timm_calls(args, compiled=True)
    calls = {k: x for k, x in calls.items() if k == "ours" or k in args.peers}

    products = matmuls(mesh, args.dtype)
    flops = model_flops(our_config(args), mesh, NUM_CLASSES)
    for mode in args.modes:
        turns = {name: call[mode] for name, call in calls.items()}
        turns |= {f"matmul {size}": call for size, (call, _) in products.items()}
        found = take_turns(turns, wait, args.repeats)
        peak = max(
            work / found[f"matmul {size}"].spread.median
            for size, (_, work) in products.items()
        )
        print_rows(args, mode, found, flops[mode], peak)


def print_rows(
    args: argparse.Namespace,
    mode: str,
    found: dict[str, Timing],
    flops: float,
    peak: float,
) -> None:
    """Prints a table of one kind of call."""
    print(f"\n{mode}, {flops / 1e9:,.0f} GFLOP, peak {peak / 1e9:,.0f} GFLOP/s")
    rows = [
        (
            "program",
            "s",
            "least",
            "most",
            "images/s",
            "peak",
            "cpu s",
            "ratio",
            "of cpu s",
        )
    ]
    ours = found["ours"]
    for name, timing in found.items():
        if name.startswith("matmul"):
            continue
        secs = timing.spread
        ratio = timing.over(ours)
        cpu = Timing(timing.cpu_secs, ()).over(Timing(ours.cpu_secs, ()))
        rows.append(
            (
                name,
                f"{secs.median:.3f}",
                f"{secs.least:.3f}",
                f"{secs.most:.3f}",
                f"{timing.per_sec(args.batch).median:.2f}",
                f"{flops / secs.median / peak:.0%}",
                f"{np.median(timing.cpu_secs):.2f}",
                f"{ratio.median:.2f} ({ratio.least:.2f} to {ratio.most:.2f})",
                f"{cpu.median:.2f}",
            )
        )
    print_table(rows, "<>>>>>>>>")


if __name__ == "__main__":
    main()
