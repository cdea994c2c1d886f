"""Settings under which every test runs: strict, and on eight CPU devices."""

import pathlib
import sys

import cv2
import jax
import numpy as np
import pytest
from absl import flags

from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.run.chips import CHIPS, Chip
from mixer_jax.run.loading import LoadedModel
from mixer_jax.variants import Patches, Variant
from mixer_jax.weights import layout

from . import examples

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")
flags.FLAGS(["pytest"])  # Grain reads absl flags

REPOSITORY = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(REPOSITORY))  # for train.py, which no wheel holds


# The files that take longest. If they came last, one worker would have them alone.
LONGEST = ("test_docs.py", "test_notebook.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.name not in LONGEST)


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


@pytest.fixture(scope="session")
def tfds_dir(tmp_path_factory) -> str:
    """A folder with the dataset `tiny_shapes`, prepared as array_record."""
    data_dir = str(tmp_path_factory.mktemp("tfds"))
    examples.prepare_tfds(data_dir)
    return data_dir


@pytest.fixture
def chip_of_1_gb(monkeypatch):
    """Gives the devices of this machine published figures."""
    kind = jax.devices()[0].device_kind
    monkeypatch.setitem(CHIPS, "v1", Chip(kind, 1e9, 1e12, 1e11, 1e10))


@pytest.fixture(scope="session")
def loaded():
    """A small random Mixer of seven named classes that differ."""
    variant = Variant(Patches((4, 4)), 2, 12, 6, 20)
    sizes = layout.MixerSizes(variant, num_tokens=16, num_classes=7)
    rng = np.random.default_rng(0)
    params = {k: rng.standard_normal(s, "float32") for k, s in sizes.shapes().items()}
    names = ["ant", "bee", "cat", "dog", "eel", "fox", "gnu"]
    return LoadedModel(
        sizes.create_model(), layout.unflatten(params), EvalTransform(16), names
    )


@pytest.fixture(scope="session")
def logits(loaded):
    """Computes the logits of images, uint8 [n, 16, 16, 3]."""

    def compute(images):
        inputs = (np.stack(images).astype("float32") - 127.5) / 127.5
        return np.asarray(
            loaded.model.apply({"params": loaded.params}, inputs, train=False)
        )

    return compute


@pytest.fixture(scope="session")
def write_image():
    def write(path, image):
        path.parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(path), image[..., ::-1])

    return write
