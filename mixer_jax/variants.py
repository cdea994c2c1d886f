"""The sizes of the Mixer variants, as data: the paper's Table 1, and S/8."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Variant:
    """Sizes of one Mixer.

    Attributes:
      patch_size: side of a square patch, in pixels.
      num_blocks: number of Mixer blocks.
      hidden_dim: channels C of a token.
      tokens_mlp_dim: hidden units D_S of the token-mixing MLP.
      channels_mlp_dim: hidden units D_C of the channel-mixing MLP.
    """

    patch_size: int
    num_blocks: int
    hidden_dim: int
    tokens_mlp_dim: int
    channels_mlp_dim: int


VARIANTS = {
    "S/32": Variant(32, 8, 512, 256, 2048),
    "S/16": Variant(16, 8, 512, 256, 2048),
    "S/8": Variant(8, 8, 512, 256, 2048),
    "B/32": Variant(32, 12, 768, 384, 3072),
    "B/16": Variant(16, 12, 768, 384, 3072),
    "L/32": Variant(32, 24, 1024, 512, 4096),
    "L/16": Variant(16, 24, 1024, 512, 4096),
    "H/14": Variant(14, 32, 1280, 640, 5120),
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
