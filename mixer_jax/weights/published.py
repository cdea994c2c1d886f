"""The eleven checkpoints that Google published, by name, and checkpoints by URL.

They are fetched once over https, without an account, into a folder of the user:
`$MIXER_JAX_CACHE` if that is set, else the system's place for caches.
"""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import re
import urllib.parse
from typing import Any

import pooch

from mixer_jax.files import replace_when_whole
from mixer_jax.variants import get_variant
from mixer_jax.weights import layout, names, npz
from mixer_jax.weights.layout import CheckpointError, MixerSizes
from mixer_jax.weights.pytorch import read_pytorch

SUFFIXES = (".npz", ".safetensors")  # of files of parameters
BUCKET = "gs://mixer_models/"
# Of MlpMixer, as the published files were trained.
PUBLISHED_FIELDS = {"gelu": "tanh", "layer_norm_epsilon": 1e-6}
BASE_URL = "https://storage.googleapis.com/mixer_models/"  # the same, for everyone


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """What is known of a published file.

    Attributes:
      num_bytes: size of the file.
      sizes: sizes of the model in it.
      paper_top1: ImageNet accuracy in percent of the paper's model with this
        pre-training, fine-tuned at 224 pixels (Table 3); None where it gives none.
    """

    num_bytes: int
    sizes: MixerSizes
    paper_top1: float | None = None


def _file(
    variant: str, num_classes: int, num_bytes: int, paper_top1: float | None = None
) -> PublishedFile:
    sizes = layout.sizes_of(get_variant(variant), num_classes)
    return PublishedFile(num_bytes, sizes, paper_top1)


# Names repeat across folders: a file is known by both.
PUBLISHED = {
    "imagenet1k/Mixer-B_16": _file("B/16", 1000, 239_564_448, 76.44),
    "imagenet1k/Mixer-L_16": _file("L/16", 1000, 832_868_560, 71.76),
    "imagenet21k/Mixer-B_16": _file("B/16", 21843, 303_677_516, 80.64),
    "imagenet21k/Mixer-L_16": _file("L/16", 21843, 918_324_860, 82.89),
    "sam/Mixer-B_16": _file("B/16", 1000, 239_567_448),
    "sam/Mixer-B_32": _file("B/32", 1000, 241_219_272),
    "gsam/Mixer-B_16": _file("B/16", 1000, 239_567_448),
    "gsam/Mixer-B_32": _file("B/32", 1000, 241_219_272),
    "gsam/Mixer-S_16": _file("S/16", 1000, 74_143_928),
    "gsam/Mixer-S_32": _file("S/32", 1000, 76_449_368),
    "gsam/Mixer-S_8": _file("S/8", 1000, 82_616_888),
}


def read_published(name: str) -> tuple[dict[str, Any], str]:
    """Returns the parameters of one of PUBLISHED, and the file that they are from.

    Raises:
      OSError: the file cannot be fetched.
      CheckpointError: it is not sound, or not the one that was published.
    """
    path = resolve(name)
    params = npz.read_checkpoint(path)
    advice = "Delete the file to have it fetched again."
    _check_published(layout.shapes_of(params), PUBLISHED[name], str(path), advice)
    return params, str(path)


def resolve(name_or_path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the local file that a name stands for, fetched if need be.

    Args:
      name_or_path: one of PUBLISHED, such as "imagenet21k/Mixer-B_16"; the same as
        "gs://mixer_models/imagenet21k/Mixer-B_16.npz"; an http(s) URL; or a path. What
        was fetched from a URL once is not fetched again.

    Raises:
      FileNotFoundError: no local file has that path.
      OSError: a file could not be fetched; the message says where to put it by hand.
      CheckpointError: a file was fetched, but is not what it should be, and so was not
        kept; or no file is published under that name.
    """
    text = os.fspath(name_or_path)
    if name := published_name(text):
        return _fetch(f"{BASE_URL}{name}.npz", _cache_path(name), PUBLISHED[name])
    if text.startswith(("https://", "http://")):
        return _fetch(text, _url_cache_path(text), None)
    if "://" in text:
        raise CheckpointError(
            f"{without_secrets(text)}: only {BUCKET} and http(s) URLs can be fetched. "
            "Copy the file to a local path with the tools of its store."
        )
    path = pathlib.Path(text).expanduser()
    if not path.exists():
        beside = sorted(
            x.name for x in path.parent.glob("*") if x.suffix in SUFFIXES or x.is_dir()
        )
        raise FileNotFoundError(
            f"{text}: no such file, and not the name of a published one. "
            f"In {path.parent}: {', '.join(beside[:20]) or 'no model'}. "
            f"{_names()}"
        )
    return path


def cache_dir() -> pathlib.Path:
    """Returns the folder that fetched files are kept in; it may not exist yet."""
    folder = os.environ.get("MIXER_JAX_CACHE") or pooch.os_cache("mixer_jax")
    return pathlib.Path(folder).expanduser()


def is_cached(name: str) -> bool:
    """Returns whether a file of PUBLISHED is in the cache, with the right size."""
    path = _cache_path(name)
    return path.is_file() and path.stat().st_size == PUBLISHED[name].num_bytes


def without_secrets(text: str) -> str:
    """Returns a text without the passwords and queries of the URLs in it."""
    text = re.sub(r"(?<=//)[^/@\s]+@", "", text)
    return re.sub(r"(?<=\S)\?[^\s'\")]+", "?...", text)


def _cache_path(name: str) -> pathlib.Path:
    return cache_dir().joinpath(*f"{name}.npz".split("/"))


def _url_cache_path(url: str) -> pathlib.Path:
    """Names a file after the last part of its URL, and a hash of the whole."""
    last = pathlib.PurePosixPath(urllib.parse.urlsplit(url).path)
    suffix = last.suffix if last.suffix in SUFFIXES else ".npz"
    stem = last.name.removesuffix(suffix)
    readable = re.sub(r"[^\w.-]+", "_", stem, flags=re.ASCII)[:80]
    digest = hashlib.sha256(url.encode()).hexdigest()[:16]
    return cache_dir() / "urls" / f"{readable}-{digest}{suffix}"


def is_published_folder(text: str) -> bool:
    """Returns whether a text is the bare name of a published folder."""
    return text.rstrip("/") in {name.split("/")[0] for name in PUBLISHED}


def published_name(text: str) -> str | None:
    """Returns the key in PUBLISHED that a name or URL means, None if it means none.

    Raises:
      CheckpointError: the URL is the bucket's, but no file is published there.
    """
    for prefix in (BUCKET, BASE_URL):
        if text.startswith(prefix):
            name = text.removeprefix(prefix).removesuffix(".npz")
            if name not in PUBLISHED:
                text = without_secrets(text)
                raise CheckpointError(f"{text}: no such published file. {_names()}")
            return name
    return text if text in PUBLISHED else None


def _names() -> str:
    return f"Published are {', '.join(PUBLISHED)}."


def _fetch(
    url: str, path: pathlib.Path, published: PublishedFile | None
) -> pathlib.Path:
    """Returns `path`, with the file at `url` in it only if that is whole and right."""
    num_bytes = published.num_bytes if published else None
    if path.is_file() and num_bytes in (None, path.stat().st_size):
        return path
    size = f" ({num_bytes:,} bytes)" if num_bytes else ""
    shown = without_secrets(url)
    try:
        with replace_when_whole(path) as partial, contextlib.ExitStack() as stack:
            # pooch leaves the connection of a refused request open: close it after it.
            close = {"response": lambda response, **_: stack.enter_context(response)}
            download = pooch.HTTPDownloader(
                progressbar=True, chunk_size=2**20, hooks=close
            )
            download(url, str(partial), None)
            try:
                _check_download(partial, path.suffix, published)
            except CheckpointError as error:
                message = f"{shown} did not send what it should, nothing was kept: "
                raise CheckpointError(message + str(error)) from error
    except OSError as error:
        raise OSError(
            f"{shown} could not be fetched: {without_secrets(str(error))}. Where this "
            f"machine has no connection, fetch it{size} elsewhere and put it at {path}"
        ) from None  # a traceback would show the whole URL
    return path


def _check_download(
    path: pathlib.Path, suffix: str, published: PublishedFile | None
) -> None:
    if published and (size := path.stat().st_size) != published.num_bytes:
        raise CheckpointError(
            f"{size:,} bytes arrived, expected {published.num_bytes:,}. Try again."
        )
    if suffix == ".safetensors":
        read_pytorch(path)
        return
    shapes = npz.read_shapes(path)
    if published:
        _check_published(shapes, published, "What arrived", "Try again.")


def _check_published(
    shapes: layout.Shapes, published: PublishedFile, where: str, advice: str
) -> None:
    """Checks sizes and keys, by names alone: this code's model may be changed."""
    sizes = layout.infer_sizes(shapes, where)
    wrong = names.differences(shapes)
    if sizes != published.sizes or wrong:
        about = (
            f"{where} holds a {sizes}; the published file holds a {published.sizes}. "
            f"{advice}"
        )
        raise CheckpointError("\n  ".join([about, *wrong]))
