"""The paper's pre-training recipe, scaled to handwritten digits, from scratch.

python train.py --config configs/pretrain_digits.py
"""

import ml_collections

from configs import common, digits


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config; the argument "smoke" shrinks it."""
    config = digits.get_config()
    config.loss = "sigmoid"
    config.head_bias_init = -2.3  # -log(10)
    config.optim_dtype = "float32"
    config.decay_type = "linear"
    config.linear_end = 1e-5 * config.base_lr
    # RandAugment counts in pixels of large images. These are 112 pixels of 8, in 16
    # patches as before, and its magnitude is a fifth of ImageNet's.
    config.pp.crop = 112
    config.model.patches.size = (28, 28)
    config.pp.randaugment = (1, 3.0)
    config.mixup_p = 0.2
    config.total_steps = 3_000
    config.eval_every = 1_000
    config.model.stoch_depth = 0.1
    common.add_evaluator(config, "fewshot", type="fewshot")
    if argument not in ("", "smoke"):
        raise ValueError(f"{argument!r}: this config takes no argument but smoke.")
    return common.shrink(config) if argument else config
