"""Fine-tunes Mixer-H/14, of which no parameters were published, at 224 pixels.

    python train.py --config configs/h14.py
    python train.py --config configs/h14.py:cifar100
    python train.py --config configs/h14.py:<folder of images>

It starts from scratch unless --config.pretrained_dir names a folder with
Mixer-H_14.npz. What it reaches has not been measured here.
"""

import ml_collections

from configs import common


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
    """Returns the config for `dataset`: a name or a folder, see configs/common.py."""
    config = common.get_config()
    config.model = common.get_model("Mixer-H_14")
    config.pretrained_dir = None
    return common.with_dataset(config, dataset)
