import dataclasses

import numpy as np
import pytest

from mixer_jax.variants import Patches, Variant
from mixer_jax.weights import layout


class Tiny:
    """A small Mixer for images of 16x16 pixels, and random parameters of any Mixer."""

    sizes = layout.MixerSizes(Variant(Patches((4, 4)), 2, 12, 6, 20), 16, 5)

    def sizes_with(self, **changes):
        """The sizes with fields of Variant or MixerSizes changed."""
        names = [x.name for x in dataclasses.fields(Variant)]
        variant = {k: x for k, x in changes.items() if k in names}
        others = {k: x for k, x in changes.items() if k not in names}
        variant = dataclasses.replace(self.sizes.variant, **variant)
        return dataclasses.replace(self.sizes, variant=variant, **others)

    def flat(self, sizes=sizes, seed=0):
        rng = np.random.default_rng(seed)
        shapes = sizes.shapes()
        return {k: rng.standard_normal(s, "float32") for k, s in shapes.items()}

    def tree(self, sizes=sizes, seed=0):
        return layout.unflatten(self.flat(sizes, seed))


@pytest.fixture(scope="session")
def tiny():
    return Tiny()


@pytest.fixture(scope="session")
def assert_same():
    """Checks that two nested dicts hold the same arrays, to the bit."""

    def check(found, expected):
        found, expected = layout.flatten(found), layout.flatten(expected)
        assert found.keys() == expected.keys()
        for key, array in expected.items():
            assert found[key].dtype == array.dtype == np.float32
            np.testing.assert_array_equal(found[key], array, err_msg=key)

    return check
