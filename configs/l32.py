"""Fine-tunes Mixer-L/32, of which no parameters were published, at 224 pixels.

    python train.py --config configs/l32.py
    python train.py --config configs/l32.py:cifar100
    python train.py --config configs/l32.py:<folder of images>

It starts from scratch unless --config.pretrained_dir names a folder with
Mixer-L_32.npz. What it reaches has not been measured here.
"""

import functools

from configs import common

get_config = functools.partial(common.get_finetune_config, "Mixer-L_32", None)
