"""A run up to its first step, for `mixer_jax.benchmark.start`, which starts it anew.

It reads a pickled config, does what `mixer_jax.run.trainer` does up to there, and
prints when each stage ended, in seconds since the epoch, and the processor time, as a
line of JSON.
"""

import json
import pickle
import sys
import time

ENDS: dict[str, float] = {}


def main() -> None:
    """Makes the first step of the run whose config comes from standard input."""
    config = pickle.load(sys.stdin.buffer)

    import jax

    from mixer_jax.run.config import ConfigError, in_steps
    from mixer_jax.run.data import open_data, open_evals
    from mixer_jax.run.program import build_program, check_run, step_rng
    from mixer_jax.run.start import initial_state
    from mixer_jax.run.trainer import train_and_evaluate
    from mixer_jax.training import sharding

    del train_and_evaluate  # train.py imports it
    _end("import")
    jax.devices()
    _end("devices")
    try:
        config, mesh = check_run(config)
    except ConfigError as error:
        sys.exit(str(error))
    with jax.set_mesh(mesh):
        data = open_evals(open_data(config))
        config = in_steps(config, len(data.train_source))
        _end("data")
        classes = data.class_names
        program = build_program(config, mesh, len(classes), multilabel=data.multilabel)
        _end("program")
        state = jax.block_until_ready(initial_state(config, program, classes, mesh))
        rng = step_rng(config, mesh)
        _end("init")
        with data.train_batches(0, mesh) as batches:
            rows = next(batches)
            batch = sharding.shard_batch(mesh, rows)
            step = program.train_step.lower(state, batch, rng).compile()
            _end("compile")
            jax.block_until_ready(step(state, batch, rng))
            _end("first step")
    print(json.dumps(ENDS | {"cpu": time.process_time()}))


def _end(stage: str) -> None:
    ENDS[stage] = time.time()


if __name__ == "__main__":
    main()
