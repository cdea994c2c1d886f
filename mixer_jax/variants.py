"""The sizes of the Mixer variants: Table 1 of the paper, and S/8."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple


class Patches(NamedTuple):
    """The size of a patch, (height, width) in pixels."""

    size: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Variant:
    """The sizes of a Mixer, with the names of MlpMixer's fields.

    Attributes:
      patches: size of a patch.
      num_blocks: number of Mixer blocks.
      hidden_dim: channels C of a token.
      tokens_mlp_dim: hidden units D_S of the token-mixing MLPs.
      channels_mlp_dim: hidden units D_C of the channel-mixing MLPs.
    """

    patches: Patches
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int

    @property
    def name(self) -> str | None:
        """The key in VARIANTS, such as "B/16"; None if it is no published variant."""
        return next((name for name, sizes in VARIANTS.items() if sizes == self), None)


VARIANTS = {
    "S/32": Variant(Patches((32, 32)), 8, 512, 256, 2048),
    "S/16": Variant(Patches((16, 16)), 8, 512, 256, 2048),
    "S/8": Variant(Patches((8, 8)), 8, 512, 256, 2048),
    "B/32": Variant(Patches((32, 32)), 12, 768, 384, 3072),
    "B/16": Variant(Patches((16, 16)), 12, 768, 384, 3072),
    "L/32": Variant(Patches((32, 32)), 24, 1024, 512, 4096),
    "L/16": Variant(Patches((16, 16)), 24, 1024, 512, 4096),
    "H/14": Variant(Patches((14, 14)), 32, 1280, 640, 5120),
}


def get_variant(name: str) -> Variant:
    """Returns the sizes of `name`, given as "B/16" or as published, "Mixer-B_16".

    Raises:
      ValueError: no variant has that name.
    """
    key = name.removeprefix("Mixer-").replace("_", "/")
    if key not in VARIANTS:
        raise ValueError(
            f"No Mixer variant is called {name!r}. There are {', '.join(VARIANTS)}; "
            "the published spelling, such as 'Mixer-B_16', works too."
        )
    return VARIANTS[key]


def count_patches(
    image_size: Sequence[int], patch_size: Sequence[int]
) -> tuple[int, int]:
    """Returns the numbers of patches (down, across) of an image.

    Args:
      image_size: (height, width) in pixels.
      patch_size: (height, width) in pixels.

    Raises:
      ValueError: the image cannot be cut into whole patches.
    """
    (height, width), (patch_height, patch_width) = image_size, patch_size
    if height % patch_height or width % patch_width:
        raise ValueError(
            f"Images of {height}x{width} pixels cannot be cut into patches of "
            f"{patch_height}x{patch_width}. Resize them to a multiple of the patch."
        )
    return height // patch_height, width // patch_width
