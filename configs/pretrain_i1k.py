"""Pre-trains a Mixer on ImageNet from scratch, as the paper and big_vision do.

    python train.py --config configs/pretrain_i1k.py        (B/16)
    python train.py --config configs/pretrain_i1k.py:l16    (b32, s16, l32, … too)

ImageNet is downloaded by hand: see --config.tfds_manual_dir. big_vision reaches
76.3 % with B/16, in 2 h 11 min on a TPU v3-128, and the paper 76.44 % with B/16 and
71.76 % with L/16. Not measured here.
"""

import ml_collections

from configs import common


def get_config(argument: str = "b16") -> ml_collections.ConfigDict:
    """Returns the config of a variant, such as "b16" or "b16,smoke"."""
    variant, smoke = common.split_argument(argument)
    config = common.get_pretrain_config(variant or "b16")
    config.dataset = "imagenet2012"
    config.pp.train = "train[:99%]"
    config.pp.test = "validation"
    config.head_bias_init = -6.9  # about -log(1000)
    config.pp.randaugment = (2, 15.0)
    config.mixup_p = 0.5

    small = {"dataset": "imagenet2012", "split": "train[99%:]"}
    common.add_evaluator(config, "minival", **small)
    common.add_evaluator(
        config,
        "real",
        dataset="imagenet2012_real",
        split="validation",
        label_key="real_label",
    )
    common.add_evaluator(config, "v2", dataset="imagenet_v2", split="test")
    return common.shrink(config) if smoke else config
