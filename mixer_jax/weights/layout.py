"""The published parameter tree: its keys, its shapes, and the sizes they imply.

A tree is written flat here, with its keys joined by "/": "stem/kernel".
"""

import dataclasses
import math
import re
import statistics
from collections.abc import Mapping
from typing import Any

from flax import traverse_util

from mixer_jax.model import MlpMixer
from mixer_jax.variants import Patches, Variant, get_variant

Shapes = dict[str, tuple[int, ...]]

# How the files of other programs begin, for an error that says what a file is.
_OTHER_FILES = {
    "Transformer/": "a Vision Transformer",
    "params/": "a whole state: take the tree below 'params'",
    "stem.": "a PyTorch state dict: see mixer_jax.weights.timm",
    "blocks.": "a PyTorch state dict: see mixer_jax.weights.timm",
    "archive/": "a PyTorch pickle: save it as safetensors, see mixer_jax.weights.timm",
    "arr_0": "unnamed arrays",
}


class CheckpointError(ValueError):
    """A file of parameters that is damaged, not a Mixer, or of another model."""


@dataclasses.dataclass(frozen=True)
class MixerSizes:
    """What the shapes of a Mixer's parameters say.

    Attributes:
      patch_size: (height, width) of a patch in pixels.
      num_blocks: number of Mixer blocks.
      hidden_dim: channels C of a token.
      tokens_mlp_dim: hidden units D_S of the token-mixing MLPs.
      channels_mlp_dim: hidden units D_C of the channel-mixing MLPs.
      num_tokens: patches S of an image.
      num_classes: classes of the head, None without one.
      image_channels: channels of an image.
    """

    patch_size: tuple[int, int]
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int
    num_tokens: int
    num_classes: int | None
    image_channels: int = 3

    @property
    def variant(self) -> str | None:
        """The variant that has these sizes, such as "B/16", at any resolution."""
        return Variant(
            Patches(self.patch_size),
            self.num_blocks,
            self.hidden_dim,
            self.tokens_mlp_dim,
            self.channels_mlp_dim,
        ).name

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, if as many patches go down as across."""
        side = math.isqrt(self.num_tokens)
        if side * side != self.num_tokens:
            return None
        return side * self.patch_size[0], side * self.patch_size[1]

    def shapes(self) -> Shapes:
        """The shape of every parameter by its key, as Flax initialises them."""

        def norm(name: str) -> Shapes:
            return {f"{name}/{x}": (self.hidden_dim,) for x in ("scale", "bias")}

        def dense(name: str, *shape: int) -> Shapes:
            return {f"{name}/kernel": shape, f"{name}/bias": shape[-1:]}

        tokens, channels = self.num_tokens, self.hidden_dim
        shapes = dense("stem", *self.patch_size, self.image_channels, channels)
        for block in (f"MixerBlock_{i}" for i in range(self.num_blocks)):
            for i in (0, 1):
                shapes |= norm(f"{block}/LayerNorm_{i}")
            for mlp, width, hidden in (
                ("token_mixing", tokens, self.tokens_mlp_dim),
                ("channel_mixing", channels, self.channels_mlp_dim),
            ):
                shapes |= dense(f"{block}/{mlp}/Dense_0", width, hidden)
                shapes |= dense(f"{block}/{mlp}/Dense_1", hidden, width)
        shapes |= norm("pre_head_layer_norm")
        if self.num_classes is not None:
            shapes |= dense("head", channels, self.num_classes)
        return shapes

    def create_model(self, **overrides: Any) -> MlpMixer:
        """Returns the Mixer of these sizes; `overrides` are fields of MlpMixer."""
        fields: dict[str, Any] = {
            "patches": Patches(self.patch_size),
            "num_classes": self.num_classes,
            "num_blocks": self.num_blocks,
            "hidden_dim": self.hidden_dim,
            "tokens_mlp_dim": self.tokens_mlp_dim,
            "channels_mlp_dim": self.channels_mlp_dim,
            "model_name": self.variant,
        }
        return MlpMixer(**(fields | overrides))

    def __str__(self) -> str:
        """A phrase for messages."""
        images = "{}x{} pixels".format(*self.image_size) if self.image_size else "?"
        patches = "{}x{}".format(*self.patch_size)
        return (
            f"Mixer {self.variant or 'of no published variant'} with "
            f"{self.num_blocks} blocks, {self.hidden_dim} channels, token and channel "
            f"MLPs of {self.tokens_mlp_dim} and {self.channels_mlp_dim}, "
            f"{self.num_tokens} tokens (images of {images}, patches of {patches}) and "
            f"{self.num_classes or 'no'} classes"
        )


def variant_sizes(
    name: str, num_classes: int | None, image_size: int = 224
) -> MixerSizes:
    """Returns the sizes of the variant `name`, for square images of `image_size` px."""
    v = get_variant(name)
    return MixerSizes(
        v.patches.size,
        v.num_blocks,
        v.hidden_dim,
        v.tokens_mlp_dim,
        v.channels_mlp_dim,
        num_tokens=(image_size // v.patches.size[0]) ** 2,
        num_classes=num_classes,
    )


def infer_model(params: Mapping[str, Any]) -> MixerSizes:
    """Returns the sizes of the model that `params`, a published tree, belong to.

    Raises:
      TypeError: `params` is no nested dict of arrays.
      CheckpointError: a key is missing, unknown, or of a shape that does not fit the
        others.
    """
    return infer_sizes(shapes_of(params), "The parameters")


def infer_sizes(shapes: Shapes, where: str, *, more: bool = False) -> MixerSizes:
    """Does infer_model's work on flat shapes; `where` begins the message of an error.

    Each size is what most of its arrays say, so that an odd one out is named. With
    `more`, keys that no Mixer has are let pass.
    """
    check_is_mixer(shapes, where)

    def size(suffix: str, axis: int, rank: int = 2) -> int:
        found = [
            shape[axis]
            for key, shape in shapes.items()
            if key.endswith(suffix) and len(shape) == rank
        ]
        if not found:
            raise CheckpointError(
                f"{where}: no key ends in {suffix!r} with {rank} axes, and a Mixer "
                f"has at least one. Found {', '.join(list(shapes)[:6])}, ..."
            )
        return statistics.mode(found)

    # Four digits: a stray number must not make a table of a billion keys.
    blocks = [re.match(r"MixerBlock_(0|[1-9]\d{0,3})/", key) for key in shapes]
    sizes = MixerSizes(
        (size("stem/kernel", 0, rank=4), size("stem/kernel", 1, rank=4)),
        1 + max(int(match[1]) for match in blocks if match),
        size("/scale", 0, rank=1),
        size("token_mixing/Dense_0/kernel", 1),
        size("channel_mixing/Dense_0/kernel", 1),
        size("token_mixing/Dense_0/kernel", 0),
        num_classes=(
            size("head/kernel", 1)
            if any(key.startswith("head/") for key in shapes)
            else None
        ),
        image_channels=size("stem/kernel", 2, rank=4),
    )
    expected = sizes.shapes()
    if more:
        shapes = {key: shape for key, shape in shapes.items() if key in expected}
    check_shapes(
        shapes,
        expected,
        f"{where}: not the keys and shapes of a Mixer (what a changed model adds "
        "belongs in mixer_jax.weights.layout.MixerSizes.shapes)",
    )
    return sizes


def check_is_mixer(keys: Mapping[str, Any], where: str) -> None:
    """Raises a CheckpointError that says what `keys` look like, if not like a Mixer."""
    if any(re.match(r"MixerBlock_(0|[1-9]\d{0,3})/", key) for key in keys):
        return
    looks = [
        what
        for start, what in _OTHER_FILES.items()
        if any(key.startswith(start) for key in keys)
    ]
    raise CheckpointError(
        f"{where}: no Mixer, which has keys such as 'MixerBlock_0/LayerNorm_0/scale'. "
        f"Found {', '.join(list(keys)[:6]) or 'no keys at all'}"
        f"{', ...' if len(keys) > 6 else ''}"
        f"{f': this looks like {looks[0]}' if looks else ''}."
    )


def check_shapes(found: Shapes, expected: Shapes, where: str) -> None:
    """Raises a CheckpointError that names every missing, unknown and misshapen key."""
    lines = [
        f"  {key}: missing, expected {shape}"
        for key, shape in expected.items()
        if key not in found
    ]
    lines += [
        f"  {key}: found {shape}, expected no such key"
        if key not in expected
        else f"  {key}: found {shape}, expected {expected[key]}"
        for key, shape in found.items()
        if shape != expected.get(key)
    ]
    if lines:
        raise CheckpointError("\n".join([f"{where}.", *lines]))


def flatten(params: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a nested dict of arrays flat. Raises a TypeError for anything else."""
    if not isinstance(params, Mapping):
        raise TypeError(
            f"Parameters are a nested dict of arrays; found {type(params).__name__}."
        )
    flat = traverse_util.flatten_dict(params, sep="/")
    for key, leaf in flat.items():
        if not hasattr(leaf, "shape"):
            raise TypeError(f"{key}: expected an array, found {type(leaf).__name__}.")
    return flat


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Returns flat parameters nested."""
    return traverse_util.unflatten_dict(flat, sep="/")


def shapes_of(params: Mapping[str, Any]) -> Shapes:
    """Returns the shapes of a nested dict of arrays, flat."""
    return {key: tuple(leaf.shape) for key, leaf in flatten(params).items()}
