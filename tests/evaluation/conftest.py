import cv2
import numpy as np
import pytest

from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.evaluation.loading import LoadedModel
from mixer_jax.weights import layout


@pytest.fixture(scope="session")
def loaded():
    """A small random Mixer of seven named classes that differ."""
    sizes = layout.MixerSizes((4, 4), 2, 12, 6, 20, num_tokens=16, num_classes=7)
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
