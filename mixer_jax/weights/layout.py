"""Trees of parameters: their shapes, and the sizes of the Mixer that they belong to.

A tree is written flat here, with its keys joined by "/": "stem/kernel". Shapes come
from the model, and so follow it when it is changed. Only a bare file, which comes
without a config, has its sizes inferred from the shapes of the published parameters.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util

from mixer_jax.model import MlpMixer
from mixer_jax.variants import Patches, Variant, count_patches
from mixer_jax.weights import names

Shapes = dict[str, tuple[int, ...]]

_STATE_DICT = (
    "a PyTorch state dict; save it with safetensors.numpy.save_file, in a file that "
    "ends in .safetensors"
)
# How the keys of other programs' files begin, for an error that says what a file is.
_OTHER_FILES = {
    "Transformer/": "a Vision Transformer",
    "params/": "a whole state: take the tree below 'params'",
    "root_block/": "a ResNet or a hybrid of one",
    "cls_token": "a Vision Transformer of PyTorch",
    "layer1.": "a ResNet of PyTorch",
    "stem.": _STATE_DICT,
    "blocks.": _STATE_DICT,
    "arr_0": "unnamed arrays",
}


class CheckpointError(ValueError):
    """A file of parameters that is damaged, not a Mixer, or of another model."""


@dataclasses.dataclass(frozen=True)
class MixerSizes:
    """The sizes of a Mixer's parameters.

    Attributes:
      variant: the sizes that do not depend on images and classes.
      num_tokens: patches S of an image.
      num_classes: classes of the head, None without one.
      image_channels: channels of an image.
      grid: patches (down, across) of an image, if known. It is no size of parameters:
        sizes are equal whatever it is.
    """

    variant: Variant
    num_tokens: int
    num_classes: int | None
    image_channels: int = 3
    grid: tuple[int, int] | None = dataclasses.field(default=None, compare=False)

    @property
    def image_size(self) -> tuple[int, int] | None:
        """(height, width) in pixels, if the grid is known or can be square."""
        side = math.isqrt(self.num_tokens)
        down, across = self.grid or (side, side)
        if down * across != self.num_tokens:
            return None
        height, width = self.variant.patches.size
        return down * height, across * width

    def create_model(self, **overrides: Any) -> MlpMixer:
        """Returns the Mixer of these sizes; `overrides` are fields of MlpMixer."""
        fields = {**vars(self.variant), "model_name": self.variant.name}
        return MlpMixer(**{"num_classes": self.num_classes, **fields, **overrides})

    def shapes(self) -> Shapes:
        """Returns the shapes of the parameters of that model."""
        height, width = self.variant.patches.size
        # Shapes depend on the number of tokens only, so one row of patches will do.
        row = (height, self.num_tokens * width, self.image_channels)
        return shapes_of_model(self.create_model(), row)

    def __str__(self) -> str:
        """A phrase for messages."""
        v = self.variant
        images = "{}x{} pixels".format(*self.image_size) if self.image_size else "?"
        patches = "{}x{}".format(*v.patches.size)
        return (
            f"Mixer {v.name or 'of no published variant'} with {v.num_blocks} blocks, "
            f"{v.hidden_dim} channels, token and channel MLPs of {v.tokens_mlp_dim} "
            f"and {v.channels_mlp_dim}, {self.num_tokens} tokens (images of {images}, "
            f"patches of {patches}) and {self.num_classes or 'no'} classes"
        )


def sizes_of(
    model: Variant | MlpMixer,
    num_classes: int | None,
    image_size: tuple[int, int] = (224, 224),
) -> MixerSizes:
    """Returns the sizes of a variant or a model for images of (height, width)."""
    fields = {x.name: getattr(model, x.name) for x in dataclasses.fields(Variant)}
    grid = count_patches(image_size, model.patches.size)
    return MixerSizes(Variant(**fields), math.prod(grid), num_classes, grid=grid)


def infer_model(params: Mapping[str, Any], where: str = "The parameters") -> MixerSizes:
    """Returns the sizes of the Mixer that `params` belong to, a nested dict of arrays.

    Raises:
      TypeError: `params` is no nested dict of arrays.
      CheckpointError: a key is missing, unknown, or of another shape than a model of
        these sizes has. It begins with `where`, the file that `params` are from.
    """
    shapes = shapes_of(params)
    sizes = infer_sizes(shapes, where)
    check_shapes(
        shapes,
        sizes.shapes(),
        f"{where}: not the parameters of a {sizes}, as mixer_jax/model.py has it. "
        "(Where a run changed more than sizes, give its workdir, not the file.)",
    )
    return sizes


def infer_sizes(shapes: Shapes, where: str) -> MixerSizes:
    """Returns the sizes that most of the published parameters among `shapes` imply.

    Raises:
      CheckpointError: none of them says a size. The message begins with `where`.
    """
    blocks = {names.block_of(key) for key in shapes} - {None}
    if not blocks:
        raise no_mixer(shapes, where)

    def size(suffix: str, axis: int, rank: int = 2) -> int:
        found = [
            shape[axis]
            for key, shape in shapes.items()
            if key.endswith(suffix) and len(shape) == rank
        ]
        if not found:
            raise CheckpointError(
                f"{where}: no key ends in {suffix!r} with {rank} axes, and a Mixer "
                f"has at least one. Found {first_keys(shapes)}, ..."
            )
        return statistics.mode(found)  # so that the odd one out is named later

    return MixerSizes(
        Variant(
            Patches((size("stem/kernel", 0, rank=4), size("stem/kernel", 1, rank=4))),
            num_blocks=1 + max(i for i in blocks if i is not None),
            hidden_dim=size("/scale", 0, rank=1),
            tokens_mlp_dim=size("token_mixing/Dense_0/kernel", 1),
            channels_mlp_dim=size("channel_mixing/Dense_0/kernel", 1),
        ),
        num_tokens=size("token_mixing/Dense_0/kernel", 0),
        num_classes=(
            size("head/kernel", 1) if any(map(names.is_head, shapes)) else None
        ),
        image_channels=size("stem/kernel", 2, rank=4),
    )


def shapes_of_model(model: MlpMixer, image_shape: tuple[int, int, int]) -> Shapes:
    """Returns the shape of each parameter of a model, flat; computes nothing.

    Args:
      model: any model.
      image_shape: (height, width, channels) of its images.

    Raises:
      ValueError: the model does not take such images.
    """
    images = jax.ShapeDtypeStruct((1, *image_shape), jnp.float32)
    variables = jax.eval_shape(
        lambda images: model.init(jax.random.key(0), images, train=False), images
    )
    return shapes_of(variables["params"])


def check_params(
    params: Mapping[str, Any],
    model: MlpMixer,
    image_shape: tuple[int, int, int],
    where: str,
) -> None:
    """Raises a CheckpointError unless `params` are a model's, for such images.

    Args:
      params: a nested dict of arrays.
      model: any model.
      image_shape: (height, width, channels) of its images.
      where: how the message of an error begins: what the parameters are from.
    """
    size = "{}x{} pixels and {} channels".format(*image_shape)
    message = f"{where}: not the parameters of this model for images of {size}"
    try:
        expected = shapes_of_model(model, image_shape)
    except ValueError as error:  # the model says what is wrong with the images
        raise CheckpointError(f"{message}. {error}") from error
    check_shapes(shapes_of(params), expected, f"{message}.")


def check_shapes(found: Shapes, expected: Shapes, where: str) -> None:
    """Raises a CheckpointError that names every missing, unknown and misshapen key."""
    lines = [
        f"{key}: missing, expected {shape}"
        for key, shape in expected.items()
        if key not in found
    ]
    lines += [
        f"{key}: found {shape}, expected {expected.get(key, 'no such key')}"
        for key, shape in found.items()
        if shape != expected.get(key)
    ]
    if lines:
        raise CheckpointError(listed(where, lines))


def listed(about: str, lines: Sequence[str]) -> str:
    """Returns a message with a list of keys, which may be many and long."""
    shown = [f"  {line:.200}" for line in lines[:500]]
    more = [f"  and {len(lines) - 500:,} more"] if len(lines) > 500 else []
    return "\n".join([about, *shown, *more])


def no_mixer(
    keys: Iterable[str],
    where: str,
    usual: str = "'MixerBlock_0/LayerNorm_0/scale'",
) -> CheckpointError:
    """Returns the error which says that `keys` are no Mixer's, and what they are.

    Args:
      keys: all keys of a file.
      where: how the message begins: the file.
      usual: a key, in quotes, that every Mixer has in such a file.
    """
    keys = list(keys)
    found = first_keys(keys) or "no keys at all"
    more = ", ..." if len(keys) > 6 else ""
    what = looks_like(keys)
    hint = f": this looks like {what}" if what else ""
    return CheckpointError(
        f"{where}: no Mixer, which has keys such as {usual}. Found {found}{more}{hint}."
    )


def first_keys(keys: Iterable[str]) -> str:
    """Returns the first keys, which a file may have made long."""
    return ", ".join(f"{key:.100}" for key in itertools.islice(keys, 6))


def looks_like(keys: Iterable[str]) -> str | None:
    """Says which other program's file has such keys; None if that is not known."""
    keys = list(keys)
    for start, what in _OTHER_FILES.items():
        # PyTorch's wrappers put words with a dot before a name.
        if any(f".{start}" in f".{key}" for key in keys):
            return what
    return None


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
