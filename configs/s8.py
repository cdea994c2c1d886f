"""Fine-tunes Mixer-S/8, pre-trained on ImageNet with GSAM, at 224 pixels.

    python train.py --config configs/s8.py
    python train.py --config configs/s8.py:cifar100
    python train.py --config configs/s8.py:<folder of images>

Nobody has published what it reaches, and it has not been measured here.
"""

import functools

from configs import common

get_config = functools.partial(common.get_finetune_config, "Mixer-S_8", "gsam")
