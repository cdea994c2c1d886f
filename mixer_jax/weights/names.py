"""The names of the published parameters, and what PyTorch's packages call them.

These are the only tables of these names. They hold no shapes.
"""

import re
from collections.abc import Collection, Iterable
from typing import NamedTuple

# The modules of a published Mixer, and the name of the weight of each; all have a bias
# too. * is the number of a block.
_MODULES = {
    "stem": "kernel",
    "MixerBlock_*/LayerNorm_0": "scale",
    "MixerBlock_*/token_mixing/Dense_0": "kernel",
    "MixerBlock_*/token_mixing/Dense_1": "kernel",
    "MixerBlock_*/LayerNorm_1": "scale",
    "MixerBlock_*/channel_mixing/Dense_0": "kernel",
    "MixerBlock_*/channel_mixing/Dense_1": "kernel",
    "pre_head_layer_norm": "scale",
    "head": "kernel",
}


class _Package(NamedTuple):
    """What a package calls the modules above, in the same order.

    Attributes:
      modules: {i} is the number of a block, {norm} and {head} are numbers too.
      first: number of the first block.
    """

    modules: tuple[str, ...]
    first: int


PACKAGES = {
    "timm": _Package(
        (
            "stem.proj",
            "blocks.{i}.norm1",
            "blocks.{i}.mlp_tokens.fc1",
            "blocks.{i}.mlp_tokens.fc2",
            "blocks.{i}.norm2",
            "blocks.{i}.mlp_channels.fc1",
            "blocks.{i}.mlp_channels.fc2",
            "norm",
            "head",
        ),
        first=0,
    ),
    # Its modules have numbers only: their places in a sequence. 0 cuts the image into
    # patches, and the mean over tokens stands between norm and head.
    "mlp-mixer-pytorch": _Package(
        (
            "1",
            "{i}.0.norm",
            "{i}.0.fn.0",
            "{i}.0.fn.3",
            "{i}.1.norm",
            "{i}.1.fn.0",
            "{i}.1.fn.3",
            "{norm}",
            "{head}",
        ),
        first=2,
    ),
}

_KEYS = [f"{module}/{x}" for module, w in _MODULES.items() for x in (w, "bias")]
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
    return in_block(key, "*") in _KEYS


def is_head(key: str) -> bool:
    """Returns whether a key is the head's, which is always new in fine-tuning."""
    return key.startswith("head/")


def published_keys(num_blocks: int, with_head: bool) -> list[str]:
    """Returns the keys of a published Mixer."""
    return [
        key.replace("*", str(i))
        for key in _KEYS
        for i in range(num_blocks if "*" in key else 1)
        if with_head or not is_head(key)
    ]


def pytorch_names(package: str, num_blocks: int, with_head: bool) -> dict[str, str]:
    """Returns what one of PACKAGES calls each key of a published Mixer."""
    modules, first = PACKAGES[package]
    named = dict(zip(_MODULES, modules, strict=True))
    end = first + num_blocks
    found = {}
    for key in published_keys(num_blocks, with_head):
        module, _, leaf = in_block(key, "*").rpartition("/")
        number = first + (block_of(key) or 0)
        name = named[module].format(i=number, norm=end, head=end + 2)
        found[key] = f"{name}.{'bias' if leaf == 'bias' else 'weight'}"
    return found


def count_blocks(package: str, found: Iterable[str]) -> int:
    """Returns the number of blocks for which there are names of one of PACKAGES."""
    modules, first = PACKAGES[package]
    in_blocks = [re.escape(x) for x in modules if "{i}" in x]
    number = r"(?P<i>0|[1-9]\d{0,3})"
    patterns = [re.compile(x.replace(r"\{i\}", number) + r"\.") for x in in_blocks]
    matches = [pattern.match(name) for name in found for pattern in patterns]
    return max((int(x["i"]) + 1 - first for x in matches if x), default=0)


def differences(keys: Collection[str]) -> list[str]:
    """Compares keys with those of a published Mixer of as many blocks, by name alone.

    Returns:
      Lines such as "stem/bias: missing" and "stem/gate: unknown"; none if all is right.
    """
    num_blocks = 1 + max((block_of(key) or 0 for key in keys), default=0)
    expected = published_keys(num_blocks, any(map(is_head, keys)))
    missing = [f"{key}: missing" for key in expected if key not in keys]
    return missing + [f"{key}: unknown" for key in keys if key not in expected]
