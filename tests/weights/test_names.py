import pytest

from mixer_jax.weights import names


@pytest.mark.parametrize("with_head", [True, False])
def test_keys_of_a_published_mixer(tiny, with_head):
    """The table agrees with the model: it is the only place that repeats its names."""
    sizes = tiny.sizes_with(num_blocks=12, num_classes=5 if with_head else None)
    keys = names.published_keys(12, with_head)
    assert sorted(keys) == sorted(sizes.shapes())
    for package in names.PACKAGES:
        theirs = names.pytorch_names(package, 12, with_head)
        assert list(theirs) == keys
        assert len(set(theirs.values())) == len(keys)
        assert names.count_blocks(package, theirs.values()) == 12
    assert all(map(names.is_published, keys))
    assert names.differences(keys) == []


@pytest.mark.parametrize(
    "key",
    [
        "MixerBlock_0/gamma",
        "MixerBlock_00/LayerNorm_0/scale",
        "MixerBlock_12345/LayerNorm_0/scale",
        "MixerBlock_0/LayerNorm_0/kernel",
        "encoder/MixerBlock_0/LayerNorm_0/scale",
        "LayerNorm_0/scale",
        "params/stem/kernel",
        "stem/scale",
    ],
)
def test_keys_that_no_published_mixer_has(key):
    assert not names.is_published(key)


def test_blocks_and_differences():
    keys = names.published_keys(3, with_head=True)
    assert [names.block_of(x) for x in ("stem/bias", "MixerBlock_10/gamma")] == [
        None,
        10,
    ]
    assert names.in_block("MixerBlock_10/gamma", 0) == "MixerBlock_0/gamma"
    assert names.in_block("stem/bias", 0) == "stem/bias"
    changed = {*keys, "stem/gate"} - {"MixerBlock_1/LayerNorm_0/bias", "head/bias"}
    assert names.differences(changed) == [
        "MixerBlock_1/LayerNorm_0/bias: missing",
        "head/bias: missing",
        "stem/gate: unknown",
    ]
