"""Fine-tunes a Mixer for digits of 8 pixels at 12 and 16 pixels, against from scratch.

    python benchmarks/resolution.py

trains at 8 x 8 pixels first, in patches of 2 x 2. Then it trains the same number of
steps at 12 pixels from interpolated parameters, at 16 pixels from block-diagonal ones,
and at both sizes from scratch. Model and recipe are the same for both starts. It prints
the test accuracy by step, as the mean over seeds, and from which step on the two are
level: the means are within one of 364 images.
"""

import argparse
import contextlib
import io
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))  # for configs

from configs import digits
from mixer_jax.run.trainer import train_and_evaluate

LEVEL = 1 / 364  # one image of the test split
CASES = {12: "interpolate", 16: "block_diagonal"}


def get_config(crop: int, steps: int, seed: int, **overrides: Any) -> Any:
    """Returns the quick start's config with patches of 2 x 2 pixels."""
    config = digits.get_config()
    values = {
        "seed": seed,
        "pp.crop": crop,
        "model.patches.size": (2, 2),
        "total_steps": steps,
        "warmup_steps": steps // 10,
        "eval_every": max(1, steps // 20),
        "checkpoint_every": steps,
        "progress_every": steps,
    }
    config.update_from_flattened_dict(values | overrides)
    return config


def run(config: Any, workdir: pathlib.Path) -> dict[int, float]:
    """Runs a config and returns its test accuracy by step."""
    with contextlib.redirect_stdout(io.StringIO()):
        train_and_evaluate(config, workdir)
    rows = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["test/top1"] for row in rows if "test/top1" in row}


def level_from(tuned: np.ndarray, scratch: np.ndarray, steps: list[int]) -> str:
    """Returns from which step on the mean margin is at most one image."""
    apart = np.flatnonzero((tuned - scratch).mean(axis=0) > LEVEL + 1e-9)
    last = apart[-1] + 1 if len(apart) else 0
    return f"from step {steps[last]}" if last < len(steps) else "not reached"


def main() -> None:
    """Prints a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pretrain_steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()

    start = time.monotonic()
    found: dict[tuple[int, str], list[dict[int, float]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        for seed in range(args.seeds):
            small = folder / f"small-{seed}"
            by_step = run(get_config(8, args.pretrain_steps, seed), small)
            found.setdefault((8, ""), []).append(by_step)
            for crop, resolution in CASES.items():
                units = 128 if resolution == "block_diagonal" else 32
                pretrained = {"pretrained_dir": str(small), "model.model_name": "final"}
                for kind, overrides in (
                    ("tuned", pretrained | {"resolution": resolution}),
                    ("scratch", {"model.tokens_mlp_dim": units}),
                ):
                    config = get_config(crop, args.steps, seed, **overrides)
                    by_step = run(config, folder / f"{kind}-{crop}-{seed}")
                    found.setdefault((crop, kind), []).append(by_step)

    last = [list(x.values())[-1] for x in found[8, ""]]
    print(f"{time.strftime('%Y-%m-%d')}, {args.seeds} seeds, ", end="")
    print(f"{time.monotonic() - start:.0f} s")
    print(f"8 pixels, {args.pretrain_steps} steps: {np.mean(last):.2%}")
    for crop, resolution in CASES.items():
        steps = list(found[crop, "tuned"][0])
        tuned, scratch = (
            np.array([[x[step] for step in steps] for x in found[crop, kind]])
            for kind in ("tuned", "scratch")
        )
        margins = tuned - scratch
        print(f"\n8 -> {crop} pixels, {resolution}; mean, and margin of each seed")
        print(" step    tuned  scratch   margin  by seed")
        for i, step in enumerate(steps):
            by_seed = "  ".join(f"{x:+.2%}" for x in margins[:, i])
            print(
                f"{step:5}  {tuned[:, i].mean():7.2%}  {scratch[:, i].mean():7.2%}  "
                f"{margins[:, i].mean():+7.2%}  {by_seed}"
            )
        print(f"level: {level_from(tuned, scratch, steps)}")


if __name__ == "__main__":
    main()
