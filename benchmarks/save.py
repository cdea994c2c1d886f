"""Times a save of B/16 with the state of Adam: how long the loop waits, and the rest.

    python benchmarks/save.py --folder /tmp

runs on the devices that are there. Saves with and without the manifest take turns. The
loop waits for `save` alone. A blocking save would take that and the background too:
what the disk takes, and with the manifest also to read everything back and to hash it.
Compare the ratios; other programs that run at the same time change all of it.
"""

import argparse
import pathlib
import statistics
import tempfile
import time

import jax
import optax

from mixer_jax.model import create_model
from mixer_jax.training import sharding
from mixer_jax.training.checkpointing import Checkpoints
from mixer_jax.training.step import TrainState, init_state


class Plain(Checkpoints):
    """As Orbax writes them."""

    def _complete(self) -> None:
        pass


def main() -> None:
    """Prints medians in seconds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", help="on the disk to measure")
    parser.add_argument("--saves", type=int, default=5, help="of each kind")
    args = parser.parse_args()

    mesh = sharding.create_mesh()
    model, tx = create_model("B/16", num_classes=1000), optax.adamw(1e-3)

    def init(rng: jax.Array) -> TrainState:
        return init_state(model, tx, rng, (224, 224, 3))

    rng = jax.random.key(0)
    shardings = sharding.state_shardings(mesh, jax.eval_shape(init, rng))
    state = jax.block_until_ready(jax.jit(init, out_shardings=shardings)(rng))
    leaves = jax.tree.leaves(state)
    print(
        f"{sum(x.size for x in jax.tree.leaves(state.params)) / 1e6:.0f}M parameters, "
        f"{sum(x.nbytes for x in leaves) / 2**20:.0f} MiB in {len(leaves)} arrays, on "
        f"{mesh.size} x {jax.default_backend()}; "
        f"{time.strftime('%Y-%m-%d')}"
    )
    pauses: dict[type, list[float]] = {Plain: [], Checkpoints: []}
    blocking: dict[type, list[float]] = {Plain: [], Checkpoints: []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in (Plain, Checkpoints) * (args.saves + 1):
            with kind(pathlib.Path(folder, kind.__name__), keep=1) as checkpoints:
                start = time.perf_counter()
                checkpoints.save((checkpoints.latest_step() or 0) + 1, state)
                pauses[kind].append(time.perf_counter() - start)
                checkpoints.wait()
                blocking[kind].append(time.perf_counter() - start)
    plain, whole = (statistics.median(blocking[kind][1:]) for kind in blocking)
    for kind, name in ((Plain, "without"), (Checkpoints, "with")):
        pause = statistics.median(pauses[kind][1:])  # the first one compiles
        print(
            f"{name:7} manifest: the loop waits {pause:.3f} s, "
            f"{pause / plain:.1%} of a blocking save without it"
        )
    print(f"a blocking save: {plain:.2f} s without a manifest, {whole:.2f} s with it")


if __name__ == "__main__":
    main()
