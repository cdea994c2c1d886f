"""Fine-tunes Mixer-L/16, pre-trained on ImageNet-21k, at 224 pixels or another size.

    python train.py --config configs/l16.py
    python train.py --config configs/l16.py:cifar100
    python train.py --config configs/l16.py:<folder of images>
    python train.py --config configs/l16.py:imagenet2012,448

CIFAR-10: 98.34 % after 10,000 steps on four V100s, by the authors of vit_jax; not
measured here. ImageNet at 448 pixels, as in the paper's Table 3: 83.91 % there.
"""

import functools

from configs import common

get_config = functools.partial(common.get_finetune_config, "Mixer-L_16", "imagenet21k")
