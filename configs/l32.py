"""Fine-tunes Mixer-L/32, of which no parameters were published, at 224 pixels.

    python train.py --config configs/l32.py
    python train.py --config configs/l32.py:cifar100
    python train.py --config configs/l32.py:<folder of images>

It starts from scratch unless --config.pretrained_dir names a folder with
Mixer-L_32.npz. What it reaches has not been measured here.
"""

import ml_collections

from configs import common


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
    """Returns the config for `dataset`: a name or a folder, see configs/common.py."""
    config = common.get_config()
    config.model = common.get_model("Mixer-L_32")
    config.pretrained_dir = None
    return common.with_dataset(config, dataset)
