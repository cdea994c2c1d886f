"""The names of the published parameters, and what timm calls them.

This is the only table of these names. It holds no shapes.
"""

import re
from collections.abc import Collection

# The modules of a published Mixer; * is the number of a block. For each: the name of
# its weight (all have a bias too), and what timm calls the module.
_MODULES = {
    "stem": ("kernel", "stem.proj"),
    "MixerBlock_*/LayerNorm_0": ("scale", "blocks.*.norm1"),
    "MixerBlock_*/token_mixing/Dense_0": ("kernel", "blocks.*.mlp_tokens.fc1"),
    "MixerBlock_*/token_mixing/Dense_1": ("kernel", "blocks.*.mlp_tokens.fc2"),
    "MixerBlock_*/LayerNorm_1": ("scale", "blocks.*.norm2"),
    "MixerBlock_*/channel_mixing/Dense_0": ("kernel", "blocks.*.mlp_channels.fc1"),
    "MixerBlock_*/channel_mixing/Dense_1": ("kernel", "blocks.*.mlp_channels.fc2"),
    "pre_head_layer_norm": ("scale", "norm"),
    "head": ("kernel", "head"),
}
_TIMM = {
    f"{module}/{leaf}": f"{timm}.{timm_leaf}"
    for module, (weight, timm) in _MODULES.items()
    for leaf, timm_leaf in ((weight, "weight"), ("bias", "bias"))
}
# At most four digits: a stray number must not make a table of a billion keys.
_BLOCK = re.compile(r"(?<=^MixerBlock_)(0|[1-9]\d{0,3})(?=/)")


def block_of(key: str) -> int | None:
    """Returns the i of a key below "MixerBlock_<i>/", and None for other keys."""
    match = _BLOCK.search(key)
    return int(match[0]) if match else None


def in_block(key: str, i: int | str) -> str:
    """Returns the same key of another block; keys of no block stay as they are."""
    return _BLOCK.sub(str(i), key)


def is_published(key: str) -> bool:
    """Returns whether a published Mixer of some depth has this key."""
    return in_block(key, "*") in _TIMM


def is_head(key: str) -> bool:
    """Returns whether a key is the head's, which is always new in fine-tuning."""
    return key.startswith("head/")


def published_keys(num_blocks: int, with_head: bool) -> list[str]:
    """Returns the keys of a published Mixer."""
    return [
        key.replace("*", str(i))
        for key in _TIMM
        for i in range(num_blocks if "*" in key else 1)
        if with_head or not is_head(key)
    ]


def timm_name(key: str) -> str:
    """Returns what timm calls a published key; KeyError for any other."""
    return _TIMM[in_block(key, "*")].replace("*", str(block_of(key)))


def differences(keys: Collection[str]) -> list[str]:
    """Compares keys with those of a published Mixer of as many blocks, by name alone.

    Returns:
      Lines such as "stem/bias: missing" and "stem/gate: unknown"; none if all is right.
    """
    num_blocks = 1 + max((block_of(key) or 0 for key in keys), default=0)
    expected = published_keys(num_blocks, any(map(is_head, keys)))
    missing = [f"{key}: missing" for key in expected if key not in keys]
    return missing + [f"{key}: unknown" for key in keys if key not in expected]
