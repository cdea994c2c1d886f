"""Times L/16 from the model's definition to the end of the first step, scanned or not.

    python benchmarks/first_step.py

runs on CPU, each case in a new process without a compilation cache. Most of the time is
compilation. Compare the ratio; if other programs run at the same time, the ratio of
processor time. Scanned takes longer. Without the scan XLA compiles a kernel once if
several blocks need the same one. With it the gradients come stacked, and cutting them
into blocks makes the kernels of each block differ.
"""

import argparse
import subprocess
import sys
import time

CODE = """
import sys, time
import jax, jax.numpy as jnp, numpy as np
sys.path.insert(0, ".")
from configs import {config} as module
from mixer_jax.run.program import build_program
from mixer_jax.training import sharding
config = module.get_config()
config.accum_steps, config.model.scan_blocks = 1, {scan}
batch = {{"image": np.zeros(({batch}, 224, 224, 3), np.uint8)}}
batch["label"] = np.zeros({batch}, np.int32)
start, cpu = time.monotonic(), time.process_time()
mesh = sharding.create_mesh()
with jax.set_mesh(mesh):
    program = build_program(config, mesh, 1000)
    state = program.init(jax.random.key(0))
    jax.block_until_ready(state)
    init = time.monotonic()
    state, metrics = program.train_step(
        state, sharding.shard_batch(mesh, batch), jax.random.key(1))
    jax.block_until_ready(metrics)
print(init - start, time.monotonic() - init, time.process_time() - cpu)
"""


def measure_secs(config: str, batch: int, scan: bool) -> tuple[float, ...]:
    """Returns the seconds for the state, for the first step, and of processor time."""
    code = CODE.format(config=config, batch=batch, scan=scan)
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return tuple(map(float, done.stdout.split()[-3:]))


def main() -> None:
    """Prints both times and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="l16")
    parser.add_argument("--batch", type=int, default=1)
    args = parser.parse_args()
    print(time.strftime("%Y-%m-%d"))
    totals = []
    for scan in (True, False):
        init, step, cpu = measure_secs(args.config, args.batch, scan)
        totals.append((init + step, cpu))
        name = "scanned" if scan else "unrolled"
        print(
            f"{name:9} state {init:.1f} s, first step {step:.1f} s, "
            f"processor time {cpu:.1f} s",
            flush=True,
        )
    wall, cpu = (a / b for a, b in zip(*totals, strict=True))
    print(f"scanned / unrolled: {wall:.2f}, of processor time {cpu:.2f}")


if __name__ == "__main__":
    main()
