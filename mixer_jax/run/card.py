"""What a run recorded of its training, as rows for a model card."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from mixer_jax.data.names import printable
from mixer_jax.run.loading import LoadedModel
from mixer_jax.training.rows import read_rows
from mixer_jax.weights.published import BUCKET, without_secrets
from mixer_jax.weights.reading import find_checkpoint


def card_facts(
    loaded: LoadedModel, name_or_path: str | os.PathLike[str]
) -> dict[str, str]:
    """Returns what is known of a model's training, by title.

    Of paths only the last part is given, since a card is for others to read.

    Args:
      loaded: the model.
      name_or_path: what it was loaded from; of the workdir of a run the numbers of the
        last evaluation are read.
    """
    config = loaded.config
    if config is None:
        return {"Parameters from": _shown(os.fspath(name_or_path))}
    start = config.get("init_from")
    if pretrained := config["pretrained_dir"]:
        file = find_checkpoint(pretrained, config["model"]["model_name"])
        is_gone = os.path.isabs(file) and not os.path.exists(file)
        start = file.removeprefix(BUCKET).removesuffix(".npz")
        start = pretrained if is_gone else start
    facts = {
        "Trained on": _shown(config["dataset"]),
        "Started from": _shown(start) if start else "random parameters",
        "Training": _training(config),
    }
    if loaded.fingerprint:
        splits = loaded.fingerprint["splits"].items()
        counts = [f"{name} {split['count']:,}" for name, split in splits]
        facts["Images"] = ", ".join(counts)
    if row := _last_evaluation(pathlib.Path(name_or_path).expanduser()):
        step = row.pop("step")
        numbers = [f"{key} {value:.4g}" for key, value in row.items()]
        facts[f"After {step:,} steps"] = ", ".join(numbers)
    return facts


def _shown(name: str) -> str:
    """Returns a name that others may read: no folders of this machine, no secrets."""
    path = pathlib.Path(name).expanduser()  # it may have moved
    is_local = "://" not in name and (path.is_absolute() or path.exists())
    return printable(path.name if is_local else without_secrets(name))


def _training(config: Mapping[str, Any]) -> str:
    """Returns how long a run trained, and every other number that is not zero."""
    numbers = {
        key: config.get(key)
        for key in (
            *("base_lr", "decay_type", "warmup_steps", "weight_decay"),
            *("grad_norm_clip", "label_smoothing", "mixup_p", "sam_rho"),
        )
    }
    listed = [f"{key} {value}" for key, value in numbers.items() if value]
    steps = f"{config['total_steps']:,} steps of {config['batch']:,} images"
    return ", ".join([f"{steps} with {config['optimizer']}", *listed])


def _last_evaluation(workdir: pathlib.Path) -> dict[str, Any] | None:
    path = workdir / "metrics.jsonl"
    rows = read_rows(path) if path.is_file() else []
    last = None
    for row in rows:
        if any(name.endswith("/count") for name in row):
            last = row
    return last
