"""Mixers on the Hugging Face hub, by name, such as "timm/mixer_b16_224.goog_in21k".

huggingface_hub fetches them, so its cache, its environment variables (HF_HOME,
HF_HUB_OFFLINE, HF_ENDPOINT, HF_TOKEN, ...) and `hf auth login` count here too.
"""

import contextlib
import dataclasses
import hashlib
import logging
import math
import os
import pathlib
import re
from collections.abc import Iterator
from typing import NamedTuple

from mixer_jax.data.preprocess import EvalTransform, as_color
from mixer_jax.variants import get_variant
from mixer_jax.weights import layout
from mixer_jax.weights.contents import pickle_advice
from mixer_jax.weights.huggingface import (
    CONFIG,
    PARAMETERS,
    count_parameters,
    read_folder_config,
)
from mixer_jax.weights.layout import CheckpointError, MixerSizes
from mixer_jax.weights.published import (
    is_published_folder,
    without_secrets,
)
from mixer_jax.weights.timm_config import read_config

logger = logging.getLogger(__name__)

PREFIX = "hf-hub:"  # as in timm


@dataclasses.dataclass(frozen=True)
class HubModel:
    """What is known of a repository before anything is fetched.

    Attributes:
      sizes: sizes of the model in it.
      transform: makes the images that the model expects.
    """

    sizes: MixerSizes
    transform: EvalTransform


def _google(variant: str, num_classes: int) -> HubModel:
    return _model(variant, num_classes, "pil_bicubic", 0.5, 0.5)


def _miil(variant: str, num_classes: int) -> HubModel:
    return _model(variant, num_classes, "pil_bilinear", 0.0, 1.0)


def _model(
    variant: str, num_classes: int, interpolation: str, mean: float, std: float
) -> HubModel:
    transform = EvalTransform(
        (224, 224),
        "torchvision",
        (256, 256),
        interpolation=interpolation,
        mean=as_color(mean),
        std=as_color(std),
    )
    return HubModel(layout.sizes_of(get_variant(variant), num_classes), transform)


# timm's, by the tags of timm 1.0.31.
HUB_MODELS = {
    "timm/mixer_b16_224.goog_in21k_ft_in1k": _google("B/16", 1000),
    "timm/mixer_b16_224.goog_in21k": _google("B/16", 21843),
    "timm/mixer_l16_224.goog_in21k_ft_in1k": _google("L/16", 1000),
    "timm/mixer_l16_224.goog_in21k": _google("L/16", 21843),
    "timm/mixer_b16_224.miil_in21k_ft_in1k": _miil("B/16", 1000),
    "timm/mixer_b16_224.miil_in21k": _miil("B/16", 11221),
}

_NAME = re.compile(r"(\w[\w.-]*/[\w.-]+)(?:@(.+))?", re.ASCII)
# A name that ends so is the path of a file, which is not there.
_SUFFIXES = (".npz", ".safetensors", ".json", ".pt", ".pth", ".bin", ".ckpt")
# How often huggingface_hub may go on with a file that its server cuts off.
_MAX_RESUMED = 5


class HubName(NamedTuple):
    """A repository, "owner/name", and its revision: a branch, a tag or a commit."""

    repository: str
    revision: str

    def __str__(self) -> str:
        return f"{self.repository}@{self.revision}"


def is_hub_name(text: str) -> bool:
    """Returns whether a text names a repository of the hub rather than anything else.

    With the prefix "hf-hub:" it does. "owner/name" and "owner/name@revision" do, unless
    there is a file or folder of that path; or the first part is a published folder of
    Google's, or a folder here and not "timm"; or it ends as a file of parameters does.
    So a path with a mistake in it is not looked for on the hub.
    """
    if text.startswith(PREFIX):
        return True
    match = _NAME.fullmatch(text)
    if not match or os.path.exists(text) or text.endswith(_SUFFIXES):
        return False
    owner = text.partition("/")[0]
    if match[1] in HUB_MODELS:
        return True
    return not is_published_folder(owner) and not os.path.isdir(owner)


def parse_hub_name(text: str) -> HubName:
    """Returns what a text names, of which is_hub_name says that it is a hub name.

    Raises:
      CheckpointError: it is not "owner/name" or "owner/name@revision".
    """
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    match = _NAME.fullmatch(text.removeprefix(PREFIX))
    try:
        if not match or ".." in text:
            raise HFValidationError("")
        validate_repo_id(match[1])
    except HFValidationError as error:
        raise CheckpointError(
            f"{text} names no repository. Expected {PREFIX}owner/name, or with a "
            f"branch, tag or commit {PREFIX}owner/name@revision. {error}"
        ) from None
    return HubName(match[1], match[2] or "main")


def hub_urls(text: str) -> list[str]:
    """Returns the URLs of the two files of a hub name. Nothing is fetched."""
    from huggingface_hub import hf_hub_url

    name = parse_hub_name(text)
    return [
        hf_hub_url(name.repository, filename, revision=name.revision)
        for filename in (CONFIG, PARAMETERS)
    ]


def resolve_hub(text: str) -> pathlib.Path:
    """Returns the local folder of a hub name, with its two files, fetched if need be.

    Where the hub cannot be reached, its cache is used. Files that are not what they
    should be are not kept.

    Args:
      text: "owner/name" or "owner/name@revision", with or without "hf-hub:".

    Returns:
      The snapshot in huggingface_hub's cache, with config.json and model.safetensors.

    Raises:
      OSError: a file could not be fetched; the message says why, and what to do.
      CheckpointError: the text is no such name, or the repository holds no Mixer that
        can be read.
    """
    name = parse_hub_name(text)
    fetched: list[pathlib.Path] = []
    try:
        config = _fetch(name, CONFIG, fetched)
        read_config(config)  # before the large file: this may be no Mixer at all
        # Of the same commit, even if the branch moves on now.
        commit = HubName(name.repository, config.parent.name)
        _fetch(commit, PARAMETERS, fetched)
        if fetched:
            _check(config.parent, HUB_MODELS.get(name.repository))
    except CheckpointError as error:
        for path in fetched:
            _discard(path)
        kept = " Nothing was kept." if fetched else ""
        raise CheckpointError(f"{name}: {error}{kept}") from error
    return config.parent


def _fetch(name: HubName, filename: str, fetched: list[pathlib.Path]) -> pathlib.Path:
    """Returns a file in the cache, and adds it to `fetched` if it was not there."""
    import huggingface_hub as hub  # half a second to import, and seldom needed
    from huggingface_hub.errors import OfflineModeIsEnabled

    repository, revision = name

    def cached(revision: str) -> pathlib.Path | None:
        found = hub.try_to_load_from_cache(repository, filename, revision=revision)
        return pathlib.Path(found) if isinstance(found, str) else None

    if _COMMIT.fullmatch(revision) and (path := cached(revision)):
        return path
    try:
        # hf_hub_download asks a hub that is not reached again, for up to five minutes.
        url = hub.hf_hub_url(repository, filename, revision=revision)
        metadata = hub.get_hf_file_metadata(url)
        if not metadata.commit_hash or not metadata.etag:
            raise OSError("what answered is no Hugging Face hub")
    except Exception as error:  # it raises those of several libraries
        path = cached(revision)
        if path is None:
            raise _explain(name, filename, error) from None
        if not isinstance(error, OfflineModeIsEnabled):
            reason = _one_line(error)
            logger.warning("%s: taken from the cache, since %s", name, reason)
        return path
    known = cached(metadata.commit_hash)
    try:
        with _few_retries():
            path = pathlib.Path(
                hub.hf_hub_download(repository, filename, revision=revision)
            )
    except Exception as error:
        raise _explain(name, filename, error) from None
    if path != known:
        fetched.append(path)
        # In the hub's large storage a file is known by its SHA-256.
        if _SHA256.fullmatch(metadata.etag):
            with path.open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != metadata.etag:
                raise CheckpointError(
                    f"{filename} arrived damaged: its SHA-256 is {digest}, expected "
                    f"{metadata.etag}. Try again."
                )
    return path


_COMMIT, _SHA256 = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{64}")


@contextlib.contextmanager
def _few_retries() -> Iterator[None]:
    """Stops huggingface_hub from trying for ever where a server cuts a file off.

    Its warnings of each try, with URLs that let anyone read the file, are left out.
    """
    tries = 0

    def count(record: logging.LogRecord) -> bool:
        nonlocal tries
        if "Error while downloading" not in record.msg:
            return True
        tries += 1
        if tries > _MAX_RESUMED:
            raise OSError(f"the connection was cut off {tries} times")
        return False

    log = logging.getLogger("huggingface_hub.file_download")
    log.addFilter(count)
    try:
        yield
    finally:
        log.removeFilter(count)


def _explain(name: HubName, filename: str, error: Exception) -> Exception:
    """Returns the error that a file was not fetched, with what to do about it."""
    from huggingface_hub import constants, errors

    repository, revision = name
    hub = without_secrets(constants.ENDPOINT)
    sign_in = "Sign in with `hf auth login`, or set HF_TOKEN."
    if isinstance(error, errors.GatedRepoError):
        return OSError(
            f"{repository} is gated: ask its owner at {hub}/{repository}. {sign_in}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return OSError(
            f"{repository} is no file or folder here, and no repository at {hub} that "
            f"you may read. Is it private? {sign_in}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return OSError(
            f"{repository} has no branch, tag or commit {revision!r}: see "
            f"{hub}/{repository}/commits"
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return CheckpointError(
            f"there is no {filename} in the repository. {_other_file(name, filename)}"
        )
    if isinstance(error, errors.HfHubHTTPError) and error.response.status_code == 401:
        return OSError(f"{name}: {hub} refused the token. {sign_in}")
    urls = "\n  ".join(hub_urls(str(name)))
    return OSError(
        f"{name}: {filename} could not be fetched from {hub}: {_one_line(error)}. "
        "Where this machine has no connection, fetch both files elsewhere, put them in "
        f"a folder, and give that folder here:\n  {without_secrets(urls)}\n"
        f"This fetches them: hf download {repository} {CONFIG} {PARAMETERS} "
        f"--revision {revision} --local-dir FOLDER"
    )


def _other_file(name: HubName, filename: str) -> str:
    """Says how a repository without a file is used nevertheless, if it can be."""
    import huggingface_hub as hub

    repository, revision = name
    other = {CONFIG: PARAMETERS, PARAMETERS: "pytorch_model.bin"}[filename]
    get = f"hf download {repository} {other} --revision {revision} --local-dir FOLDER"
    try:
        hub.get_hf_file_metadata(hub.hf_hub_url(repository, other, revision=revision))
    except Exception:
        return f"Is it a Mixer's? There is no {other} either."
    if other == PARAMETERS:
        return f"Fetch the {other} by itself, and give that file here: {get}"
    return (
        f"It has {other}, {pickle_advice(f'FOLDER/{other}', f'FOLDER/{PARAMETERS}')}\n"
        f"This fetches it: {get}"
    )


def _check(folder: pathlib.Path, known: HubModel | None) -> None:
    """Raises a CheckpointError if the files are no Mixer, or not the known one."""
    transform = read_folder_config(folder).transform
    if not known:
        return
    found = count_parameters(folder)
    expected = sum(map(math.prod, known.sizes.shapes().values()))
    if found != expected:
        raise CheckpointError(
            f"it holds {found:,} parameters, expected the {expected:,} of a "
            f"{known.sizes}."
        )
    if transform != known.transform:
        logger.warning(
            "%s: images are made otherwise than in timm 1.0.31: %s",
            folder / CONFIG,
            transform,
        )


def _discard(path: pathlib.Path) -> None:
    """Deletes a file of a snapshot, and what it links to."""
    if path.is_symlink():
        (path.parent / path.readlink()).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


def _one_line(error: Exception) -> str:
    text = re.sub("Bearer [^'\"]+", "Bearer ...", " ".join(str(error).split()))
    return without_secrets(text) or type(error).__name__
