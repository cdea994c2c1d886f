"""What a run recorded of itself: the JSON files in its workdir, read and checked.

They may be damaged, or come from anyone. So each value that is used is checked by the
rules for configs, and an error names file and key.
"""

import pathlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from mixer_jax.data.fingerprint import Fingerprint, is_fingerprint
from mixer_jax.data.names import printable
from mixer_jax.data.sizes import MOST_RESIZED, fits_crop
from mixer_jax.data.values import are_names
from mixer_jax.json_files import read_json
from mixer_jax.run.keys import values_of
from mixer_jax.weights.layout import CheckpointError

# In config.json: how the config changed from one start to the next.
HISTORY = "history"

# What no run can be used without. Other keys may have been added since.
_NEEDED = (
    "batch",
    "dataset",
    "model.patches.size",
    "optimizer",
    "pp.crop",
    "pp.evaluation",
    "pp.resize",
    "pp.transfer",
    "pretrained_dir",
    "total_steps",
)


class Run(NamedTuple):
    """What the files in a workdir say of a run.

    Attributes:
      config: its config.json.
      class_names: of its dataset.
      multilabel: whether the images of its dataset have several labels.
      fingerprint: of its data; None for a run of before these were kept.
    """

    config: dict[str, Any]
    class_names: list[str]
    multilabel: bool
    fingerprint: Fingerprint | None


def read_run(workdir: pathlib.Path) -> Run:
    """Reads what a run recorded of itself.

    Raises:
      CheckpointError: the folder is not there, or not the workdir of a run; or a file
        is damaged.
    """
    if not workdir.is_dir():
        found = "is a file" if workdir.exists() else "is not there"
        raise CheckpointError(
            f"{printable(workdir)} {found}. Expected the workdir of a run, a folder."
        )
    for name in ("config.json", "class_names.json"):
        if not (workdir / name).exists():
            files = [
                x.name
                for x in workdir.iterdir()
                if x.suffix in (".npz", ".json", ".safetensors")
                or (x / "config.json").exists()
            ]
            raise CheckpointError(
                f"{workdir} is a folder without a {name}, and so not the workdir of a "
                "run. Name a workdir or a file. In it: "
                f"{', '.join(sorted(files)) or '-'}"
            )
    names = read_recorded_names(workdir)
    return Run(read_recorded_config(workdir), names, *read_recorded_data(workdir))


def read_recorded_config(workdir: pathlib.Path) -> dict[str, Any]:
    """Returns the config.json of a run.

    Raises:
      CheckpointError: it is damaged, or a key is missing or has a wrong value.
    """
    path = workdir / "config.json"
    config = read_json(path, CheckpointError)
    flat = dict(_by_key(config)) if isinstance(config, dict) else {}
    problems = [f"{key} is missing" for key in _NEEDED if key not in flat]
    for key, value in flat.items():
        allowed = values_of(key)
        if allowed and not allowed.include(value):
            problems.append(f"{key} is {value!r:.80}; expected {allowed.expected}")
    if not problems and flat["pp.evaluation"] != "resize":
        crop, resize = flat["pp.crop"], flat["pp.resize"]
        if not fits_crop(resize, crop):
            problems.append(
                f"pp.resize is {resize}; expected at least pp.crop, which is {crop}, "
                f"and at most {MOST_RESIZED} each way"
            )
    if not isinstance(flat.get(HISTORY, []), list):
        problems.append(f"{HISTORY} is {flat[HISTORY]!r:.80}; expected a list")
    if problems:
        raise _damaged(path, "; ".join(problems[:10]))
    return config


def _by_key(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the values by keys such as "pp.crop", whatever stands there."""
    for name, value in config.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict) and not values_of(key):
            yield from _by_key(value, f"{key}.")
        else:
            yield key, value


def read_recorded_names(workdir: pathlib.Path) -> list[str]:
    """Returns the names of the classes of a run's dataset.

    Raises:
      CheckpointError: the file is damaged.
    """
    path = workdir / "class_names.json"
    names = read_json(path, CheckpointError)
    if not are_names(names):
        raise _damaged(path, f"found {names!r:.80}; expected a list of names")
    return names


def read_recorded_data(workdir: pathlib.Path) -> tuple[bool, Fingerprint | None]:
    """Returns what a run recorded of its data: (multilabel, fingerprint), as in Run.

    Raises:
      CheckpointError: the file is damaged.
    """
    path = workdir / "dataset.json"
    about = read_json(path, CheckpointError) if path.exists() else {}
    if isinstance(about, dict):
        multilabel, print_ = about.get("multilabel", False), about.get("fingerprint")
        is_right = isinstance(multilabel, bool)
        if is_right and (print_ is None or is_fingerprint(print_)):
            return multilabel, print_
    raise _damaged(path, f"found {about!r:.80}; expected multilabel and fingerprint")


def _damaged(path: pathlib.Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{printable(path)} is not as a run writes it: {what}. Take another copy of "
        "the workdir."
    )
