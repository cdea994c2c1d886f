"""Damages the sound files of a reader many times: python -m tests.fuzzing npz."""

import argparse
import pathlib
import sys
import tempfile
import time

from . import READERS, harness


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzzing", description=__doc__
    )
    parser.add_argument("readers", nargs="+", choices=[*READERS, "all"])
    parser.add_argument("--inputs", type=int, default=100_000, help="of each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--hang", type=float, default=5.0, help="seconds of the processor for one input"
    )
    parser.add_argument("--only", type=int, help="one input, shown with all details")
    flags = parser.parse_args()
    failed = False
    for name in READERS if "all" in flags.readers else flags.readers:
        if flags.only is not None:
            return show(name, flags.seed, flags.only)
        start = time.monotonic()
        report = harness.fuzz(name, flags.inputs, flags.seed, flags.hang)
        print(
            f"{name}: {report.inputs:,} inputs in {time.monotonic() - start:.0f} s, "
            f"{sum(report.counts.values())} findings; at most {report.secs:.2f} s and "
            f"{report.megabytes:.0f} MB for one",
            flush=True,
        )
        for what, (i, details) in report.findings.items():
            again = f"--seed {flags.seed} --only {i}"
            print(f"  {report.counts[what]} x {what}: {name} {again}\n{details}")
        failed |= bool(report.findings)
    return int(failed)


def show(name: str, seed: int, i: int) -> int:
    """Reads one input, and leaves its file."""
    folder = pathlib.Path(tempfile.mkdtemp())
    fuzzer = harness.Fuzzer(READERS[name], folder)
    damaged = fuzzer.make(harness.random_of(seed, i))
    finding, secs, megabytes = harness.measured(fuzzer, damaged)
    damaged.path.write_bytes(damaged.data)
    print(f"{damaged.path}: {secs:.2f} s, {megabytes:.0f} MB")
    print("\n".join(finding) if finding else "no finding")
    return int(finding is not None)


if __name__ == "__main__":
    sys.exit(main())
