"""Fine-tunes Mixer-B/32, pre-trained on ImageNet with GSAM, at 224 pixels.

    python train.py --config configs/b32.py
    python train.py --config configs/b32.py:cifar100
    python train.py --config configs/b32.py:<folder of images>

Nobody has published what it reaches, and it has not been measured here.
"""

import ml_collections

from configs import common


def get_config(dataset: str = "cifar10") -> ml_collections.ConfigDict:
    """Returns the config for `dataset`: a name or a folder, see configs/common.py."""
    config = common.get_config()
    config.model = common.get_model("Mixer-B_32")
    config.pretrained_dir = "gsam"
    return common.with_dataset(config, dataset)
