"""Settings under which every test runs: strict, and on eight CPU devices."""

import pathlib
import sys

import jax
import numpy as np
import pytest
from absl import flags

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_threefry_partitionable", True)
flags.FLAGS(["pytest"])  # Grain reads absl flags

REPOSITORY = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))  # for train.py and configs, which no wheel holds


class Golden:
    """Data computed by the original programs; see tests/golden/README.md."""

    path = REPOSITORY / "tests" / "golden"

    def load(self, name: str) -> dict[str, np.ndarray]:
        with np.load(self.path / name) as file:
            return dict(file)

    def tree(self, arrays: dict[str, np.ndarray], prefix: str) -> dict:
        """The arrays under `prefix` as a nested dict."""
        tree: dict = {}
        for key, value in arrays.items():
            if key.startswith(prefix):
                *path, leaf = key.removeprefix(prefix).split("/")
                node = tree
                for part in path:
                    node = node.setdefault(part, {})
                node[leaf] = value
        return tree


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()
