"""Pre-trains a Mixer on ImageNet-21k from scratch, as the paper does.

    python train.py --config configs/pretrain_i21k.py       (B/16)
    python train.py --config configs/pretrain_i21k.py:l16

ImageNet-21k has to be a dataset of TensorFlow Datasets called "imagenet21k", prepared
as array_record, or a folder: give --config.dataset, and --config.pp.train and
--config.pp.test if the splits are not called so. Fine-tuned on ImageNet, the paper
reaches 80.64 % with B/16 and 82.89 % with L/16. Not measured here.
"""

import ml_collections

from configs import common

# RandAugment's magnitude and mixup's p by size (paper, table 4).
REGULARISATION = {"b": (10.0, 0.2), "l": (20.0, 0.5)}


def get_config(argument: str = "b16") -> ml_collections.ConfigDict:
    """Returns the config of a variant, such as "b16" or "l16,smoke"."""
    variant, smoke = common.split_argument(argument)
    variant = variant or "b16"
    if variant[0] not in REGULARISATION:
        raise ValueError(
            f"{variant!r}: the paper's recipes are for B and L, as in b16."
        )
    config = common.get_pretrain_config(variant)
    config.dataset = "imagenet21k"
    config.pp.train = "full[51200:]"
    config.pp.test = "full[:51200]"
    config.head_bias_init = -10.0  # about -log(21843)
    magnitude, config.mixup_p = REGULARISATION[variant[0]]
    config.pp.randaugment = (2, magnitude)
    return common.shrink(config) if smoke else config
