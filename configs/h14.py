"""Fine-tunes Mixer-H/14, of which no parameters were published, at 224 pixels.

    python train.py --config configs/h14.py
    python train.py --config configs/h14.py:cifar100
    python train.py --config configs/h14.py:<folder of images>

It starts from scratch unless --config.pretrained_dir names a folder with
Mixer-H_14.npz. What it reaches has not been measured here.
"""

import functools

from configs import common

get_config = functools.partial(common.get_finetune_config, "Mixer-H_14", None)
