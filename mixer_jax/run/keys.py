"""The keys of a config, and the values that each may have."""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

from mixer_jax.blocks import REMAT_POLICIES
from mixer_jax.data.evaluations import EVALUATIONS
from mixer_jax.data.interpolate import INTERPOLATIONS
from mixer_jax.data.permute import PERMUTATIONS
from mixer_jax.data.preprocess import TRANSFERS
from mixer_jax.data.values import (
    is_color,
    is_epsilon,
    is_number,
    is_pair,
    is_size,
    is_std,
    is_text,
    is_whole,
)
from mixer_jax.model import GELUS
from mixer_jax.training.losses import LOSSES
from mixer_jax.training.optimizer import DECAYS, OPTIMIZERS
from mixer_jax.weights.resolution import RESOLUTIONS


@dataclasses.dataclass(frozen=True)
class Values:
    """The values that a key of a config may have.

    Attributes:
      expected: describes them, after the words "expected".
      include: whether a value is one of them; takes a value of any type.
    """

    expected: str
    include: Callable[[Any], bool]

    def or_none(self) -> "Values":
        """Returns these values, and None; a flag gives None as an empty text."""
        expected = f"{self.expected}, or None (in a flag: '')"
        return Values(expected, lambda x: x in (None, "") or self.include(x))

    def or_zero(self) -> "Values":
        """Returns these values, and 0."""
        return Values(
            f"{self.expected}; or 0",
            lambda x: (is_whole(x) and x == 0) or self.include(x),
        )

    def or_default(self, default: str = "what suits the device") -> "Values":
        """Returns these values, and None, which no flag can give."""
        expected = f"{self.expected}, or no flag at all for {default}"
        return Values(expected, lambda x: x is None or self.include(x))


def _is_text(x: Any) -> bool:
    # A flag gives None as a text. Nobody means a folder or dataset of that name.
    if not is_text(x) or "\0" in x:  # no path has that
        return False
    return x.strip().lower() not in ("", "none", "null")


def _is_range(x: Any, high: float) -> bool:
    return is_pair(x) and all(map(is_number, x)) and 0 < x[0] <= x[1] <= high


def _is_multiplier(x: Any) -> bool:
    if not (is_pair(x) and _is_text(x[0]) and is_number(x[1], 0)):
        return False
    try:
        re.compile(x[0][:1000])
    except (re.error, OverflowError, RecursionError):
        return False
    return len(x[0]) <= 1000


def _whole(low: int) -> Values:
    return Values(f"a whole number, at least {low}", lambda x: is_whole(x, low))


def _size(low: int) -> Values:
    expected = (
        f"a whole number, at least {low}, or two for height and width, such as "
        "(320,224)"
    )
    return Values(expected, lambda x: is_size(x, low))


def _number(low: float) -> Values:
    return Values(f"a number, at least {low}", lambda x: is_number(x, low))


def _one_of(*choices: Any) -> Values:
    return Values(f"one of {', '.join(map(str, choices))}", lambda x: x in choices)


BOOL = Values("True or False", lambda x: isinstance(x, bool))
PROBABILITY = Values(
    "a number, at least 0 and below 1", lambda x: is_number(x, 0) and x < 1
)
TEXT = Values("a text that is not empty", _is_text)
FOLDER = Values("a folder", _is_text).or_none()
OF_FILE = "that of the file of pretrained_dir"
SPLIT = Values("a split, such as train or train[:98%]", _is_text)

# Every key of a config, and the values that it may have. What a key means stands in
# configs/common.py. A field that a fork adds to the model, model.*, needs no row.
KEYS = {
    "pretrained_dir": Values(
        "a folder of files of parameters, the name of a published one, or one file or "
        "model. To start from scratch: --config.pretrained_dir=''",
        lambda x: x in (None, "") or _is_text(x),
    ),
    "init_from": Values("the workdir of a run", _is_text).or_none(),
    "resolution": _one_of(*RESOLUTIONS),
    "dataset": TEXT,
    "label_key": TEXT.or_none(),
    "tfds_data_dir": FOLDER,
    "tfds_manual_dir": FOLDER,
    "pp.train": SPLIT.or_none(),
    "pp.test": SPLIT.or_none(),
    "pp.crop": _size(1),
    "pp.resize": _size(1),
    "pp.evaluation": _one_of(*EVALUATIONS),
    "pp.interpolation": _one_of(*INTERPOLATIONS).or_default(
        "what is usual for pp.evaluation"
    ),
    "pp.mean": Values(
        "a number from 0 to 1, or three, for pixels from 0 to 1, such as "
        "(0.485,0.456,0.406)",
        lambda x: is_color(x, 0),
    ).or_default(OF_FILE),
    "pp.std": Values(
        "a number above 0 and at most 1, or three, for pixels from 0 to 1, such as "
        "(0.229,0.224,0.225)",
        is_std,
    ).or_default(OF_FILE),
    "pp.area_range": Values(
        "two numbers, the smaller one first, above 0 and at most 1",
        lambda x: _is_range(x, 1),
    ),
    "pp.aspect_range": Values(
        "two numbers, the smaller one first, above 0", lambda x: _is_range(x, math.inf)
    ),
    "pp.flip": BOOL,
    "pp.transfer": _one_of(*TRANSFERS),
    "pp.randaugment": Values(
        "(layers, magnitude), a whole number and a number, both at least 0, such as "
        "(2, 15)",
        lambda x: is_pair(x) and is_whole(x[0], 0) and is_number(x[1], 0),
    ),
    "pp.permute": _one_of(*PERMUTATIONS).or_none(),
    "seed": Values(
        "a whole number from 0 to 2**32 - 1", lambda x: is_whole(x, 0) and x < 2**32
    ),
    "total_steps": _whole(0),
    "total_epochs": _number(0),
    "total_examples": _whole(0),
    "batch": _whole(1),
    "accum_steps": _whole(1),
    "batch_eval": _whole(1),
    "prefetch": _whole(1),
    "workers": _whole(0).or_default("what suits the machine"),
    "loss": _one_of(*LOSSES),
    "label_smoothing": PROBABILITY,
    "mixup_p": _number(0),
    "head_bias_init": Values("a number", is_number),
    "optimizer": _one_of(*OPTIMIZERS),
    "optim_dtype": _one_of("float32", "bfloat16"),
    "grad_norm_clip": Values(
        "a number, at least 0; 0 for no limit", lambda x: x is None or is_number(x, 0)
    ),
    "weight_decay": _number(0),
    "base_lr": _number(0),
    "warmup_steps": _whole(0),
    "warmup_epochs": _number(0),
    "warmup_examples": _whole(0),
    "decay_type": _one_of(*DECAYS),
    "linear_end": _number(0),
    "lr_multipliers": Values(
        "pairs (regular expression, factor), with factors of at least 0",
        lambda x: isinstance(x, tuple | list) and all(map(_is_multiplier, x)),
    ),
    "sam_rho": _number(0),
    "on_nonfinite": _one_of("stop", "skip"),
    "nonfinite_limit": _whole(1),
    "eval_every": _whole(1),
    "checkpoint_every": _whole(1),
    "keep_checkpoints": _whole(1),
    "progress_every": _whole(1),
    "profile_steps": _whole(0),
    "max_run_secs": _whole(0),
    "mesh.fsdp": _whole(1),
    "evals.*.type": _one_of("classification", "fewshot"),
    "evals.*.dataset": TEXT.or_none(),
    "evals.*.split": SPLIT,
    "evals.*.label_key": TEXT.or_none(),
    "evals.*.evaluation": _one_of(*EVALUATIONS).or_none(),
    "evals.*.resize": _size(1).or_zero(),
    "evals.*.every": _whole(0),
    "evals.*.train_split": SPLIT,
    "evals.*.shots": Values(
        "whole numbers, each at least 1",
        lambda x: (
            isinstance(x, tuple | list)
            and len(x) > 0
            and all(is_whole(n, 1) for n in x)
        ),
    ),
    "model.model_name": TEXT,
    "model.patches.size": Values(
        "two whole numbers, each at least 1, such as (16, 16)",
        lambda x: is_pair(x) and all(is_whole(n, 1) for n in x),
    ),
    "model.num_blocks": _whole(1),
    "model.hidden_dim": _whole(1),
    "model.tokens_mlp_dim": _whole(1),
    "model.channels_mlp_dim": _whole(1),
    "model.stoch_depth": PROBABILITY,
    "model.dropout_rate": PROBABILITY,
    "model.dtype": _one_of("float32", "bfloat16").or_default(),
    "model.remat": _one_of(*REMAT_POLICIES).or_default(),
    "model.scan_blocks": BOOL,
    "model.gelu": _one_of(*GELUS).or_default(OF_FILE),
    "model.layer_norm_epsilon": Values("a number, at least 0", is_epsilon).or_default(
        OF_FILE
    ),
}


def values_of(key: str) -> Values | None:
    """Returns the values of a key such as evals.pets.shots, None if it has no row."""
    return KEYS.get(row_of(key))


def row_of(key: str) -> str:
    """Returns the key of KEYS that `key` is one of."""
    return re.sub(r"^evals\.[^.]+\.", "evals.*.", key)
