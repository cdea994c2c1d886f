import math

import pytest

from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.weights import timm_config


def test_architectures():
    assert list(timm_config.ARCHITECTURES) == [
        *("mixer_s32_224", "mixer_s16_224", "mixer_b32_224"),
        *("mixer_b16_224", "mixer_l32_224", "mixer_l16_224"),
    ]


@pytest.mark.parametrize("evaluation", ["torchvision", "squash"])
@pytest.mark.parametrize("interpolation", ["pil_bilinear", "pil_bicubic"])
def test_every_size_before_the_crop_comes_back(evaluation, interpolation):
    """timm knows it only as a quotient, which it rounds."""
    for crop in ((64, 64), (224, 224), (299, 299), (320, 224), (96, 192)):
        for percent in range(60, 101):
            resize = tuple(math.floor(100 * side / percent) for side in crop)
            transform = EvalTransform(
                crop,
                evaluation,
                resize,
                interpolation=interpolation,
                mean=(0.1, 0.2, 0.3),
                std=(0.4, 0.5, 0.6),
            )
            config, note = timm_config.make_config(
                "mixer_b16_224", {"num_classes": 3}, transform, None
            )
            assert timm_config.transform_of(config["pretrained_cfg"]) == transform
            assert note is None
