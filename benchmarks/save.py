"""Times a save of B/16 with the state of Adam: how long the loop waits, and the rest.

    python benchmarks/save.py --folder /tmp

runs on the devices that are there. Saves with and without the manifest take turns. The
loop waits for `save` alone. A blocking save would take that and the background too:
what the disk takes, and with the manifest also to read everything back and to hash it.
Compare the ratios; if other programs run at the same time, those of processor time.
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

CLOCKS = (time.perf_counter, time.thread_time, time.process_time)


class Plain(Checkpoints):
    """As Orbax writes them."""

    def _add_manifest(self) -> None:
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
    secs: dict[type, list[list[float]]] = {Plain: [], Checkpoints: []}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for kind in (Plain, Checkpoints) * (args.saves + 1):
            with kind(pathlib.Path(folder, kind.__name__), keep=1) as checkpoints:
                start, thread, cpu = (clock() for clock in CLOCKS)
                checkpoints.save((checkpoints.latest_step() or 0) + 1, state)
                pause, thread_pause = time.perf_counter() - start, time.thread_time()
                checkpoints.wait()
                secs[kind].append(
                    [
                        pause,
                        time.perf_counter() - start,
                        thread_pause - thread,
                        time.process_time() - cpu,
                    ]
                )
    medians = {
        kind: [statistics.median(x) for x in zip(*values[1:], strict=True)]
        for kind, values in secs.items()  # the first save compiles
    }
    blocking, blocking_cpu = medians[Plain][1], medians[Plain][3]
    for kind, name in ((Plain, "without"), (Checkpoints, "with")):
        pause, whole, pause_cpu, cpu = medians[kind]
        print(
            f"{name:7} manifest: the loop waits {pause:.3f} s of {whole:.2f} s "
            f"({pause / blocking:.1%} of a blocking save without it); of processor "
            f"time {pause_cpu:.3f} s of {cpu:.2f} s ({pause_cpu / blocking_cpu:.1%})"
        )


if __name__ == "__main__":
    main()
