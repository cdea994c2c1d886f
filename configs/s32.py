"""Fine-tunes Mixer-S/32, pre-trained on ImageNet with GSAM, at 224 pixels.

    python train.py --config configs/s32.py
    python train.py --config configs/s32.py:cifar100
    python train.py --config configs/s32.py:<folder of images>

Nobody has published what it reaches, and it has not been measured here.
"""

import functools

from configs import common

get_config = functools.partial(common.get_finetune_config, "Mixer-S_32", "gsam")
