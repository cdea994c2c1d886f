"""Quick start: a small Mixer on scikit-learn's handwritten digits, from scratch.

python train.py --config configs/digits.py
"""

import ml_collections

from configs import common


def get_config(argument: str = "") -> ml_collections.ConfigDict:
    """Returns the config; the argument "smoke" shrinks it."""
    config = common.get_config()
    config.dataset = "digits"
    config.pp.crop = 16
    config.pp.area_range = (0.6, 1.0)
    config.pp.flip = False  # a mirrored digit is no digit

    config.model.model_name = "digits"
    config.model.patches.size = (4, 4)
    config.model.num_blocks = 3
    config.model.hidden_dim = 64
    config.model.tokens_mlp_dim = 32
    config.model.channels_mlp_dim = 256

    config.mixup_p = 0.2
    config.total_steps = 1_200
    config.batch = 64
    config.accum_steps = 1
    config.batch_eval = 128
    config.optimizer = "adam"
    config.base_lr = 0.003
    config.weight_decay = 0.1
    config.warmup_steps = 100
    config.eval_every = 300
    config.checkpoint_every = 300
    config.progress_every = 100
    if argument not in ("", "smoke"):
        raise ValueError(f"{argument!r}: this config takes no argument but smoke.")
    return common.shrink(config) if argument else config
