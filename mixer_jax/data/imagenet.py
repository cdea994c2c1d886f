"""The classes of ImageNet-1k."""

import functools
import importlib.resources


@functools.cache
def imagenet_synsets() -> dict[str, str]:
    """Returns WordNet ids and words of ImageNet-1k's classes, in the order of labels.

    That is the order of the ids, which TensorFlow Datasets and the published files use.
    """
    folder = importlib.resources.files("mixer_jax.data")
    lines = folder.joinpath("imagenet_classes.tsv").read_text("utf-8").splitlines()
    return dict(line.split("\t") for line in lines if not line.startswith("#"))


def imagenet_names() -> list[str]:
    """Returns the 1000 class names of ImageNet-1k, all different."""
    return list(imagenet_synsets().values())
