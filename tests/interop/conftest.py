"""Photographs, and models of PyTorch's packages with random parameters."""

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

# Parts of scikit-learn's two photographs: (which, left, top, right, bottom), and the
# size (width, height) that each is resized to, if it is.
PARTS = [
    ((0, 0, 0, 640, 427), None),
    ((1, 0, 0, 600, 427), None),
    ((0, 0, 0, 640, 427), (1280, 854)),
    ((1, 0, 0, 640, 427), (333, 257)),
    ((0, 100, 27, 400, 427), None),
    ((1, 200, 0, 456, 256), None),
    ((0, 320, 200, 544, 424), None),
    ((1, 10, 10, 110, 210), None),
    ((0, 0, 300, 640, 400), None),
    ((1, 100, 100, 500, 400), (500, 800)),
]


@pytest.fixture(scope="session")
def photographs():
    """Ten images of PIL, of ten sizes: large, small, tall and wide."""
    images = []
    for (which, *box), size in PARTS:
        image = Image.fromarray(load_sample_images().images[which]).crop(box)
        images.append(image.resize(size) if size else image)
    assert len({image.size for image in images}) == 10
    return images


@pytest.fixture(scope="session")
def randomize():
    """Gives every parameter a value: heads begin with zeros, and biases too."""
    torch = pytest.importorskip("torch")

    def apply(model, seed=0):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, x in model.named_parameters():
                noise = torch.randn(x.shape, generator=generator)
                if x.ndim > 1:
                    x.copy_(noise / np.sqrt(x[0].numel()))
                else:
                    x.copy_(0.1 * noise + ("norm" in name and "weight" in name))
        return model.eval()

    return apply
