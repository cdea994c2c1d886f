"""What a file is that should hold parameters, as its contents say."""

import json
import pathlib
import re
import zipfile
from collections.abc import Sequence

from mixer_jax.data.formats import describe_text

# How files begin that people take for parameters, and what to do with them.
_KINDS = (
    (rb".{8}\{", "a safetensors file. Give it a name that ends in .safetensors"),
    (
        rb"version https://git-lfs",
        "a Git LFS pointer, a text in the place of the file. Fetch it: git lfs pull",
    ),
    (
        rb"(?i)\s*<(!doctype|html|head|body|\?xml|!--)",
        "a web page. Download the file itself",
    ),
    (rb"\s*[{\[]", "a JSON text, such as a server's error. Download the file again"),
    (rb"\x1f\x8b|BZh|7z\xbc\xaf|\xfd7zXZ|Rar!", "compressed. Unpack it first"),
    (rb"\x93NUMPY", "a single array (npy). Expected an archive of named arrays"),
    (rb"\x89HDF", "an HDF5 file, such as Keras writes, which is not read"),
)
# The opcodes PROTO and MARK with which pickles begin, and the ends of their first one.
_PICKLE = re.compile(rb"\x80[\x02-\x05]|\(d|\(l|\(i|c\w+\n", re.DOTALL)


def kind_of_file(path: pathlib.Path) -> str | None:
    """Says what a file is, if it is known and holds no parameters that are read.

    Args:
      path: a file that is no npz or no safetensors file.

    Returns:
      A phrase that begins with "a" or an adjective, and what to do.
    """
    with path.open("rb") as file:
        start = file.read(1024)
    if not start:
        return "an empty file. Fetch or copy it again."
    if archive := open_zip(path):
        with archive:
            return _kind_of_archive(path, archive.namelist())
    for pattern, kind in _KINDS:
        if re.compile(pattern, re.DOTALL).match(start):
            return f"{kind}."
    if _PICKLE.match(start):
        return pickle_advice(str(path), str(path.with_suffix(".safetensors")))
    text = describe_text(start)
    return text and f"{text}. Download the file again."


def open_zip(path: pathlib.Path) -> zipfile.ZipFile | None:
    """Opens a zip archive; None if it is none, or its table of contents is damaged."""
    try:
        return zipfile.ZipFile(path)
    # It raises whatever the bytes lead to, from BadZipFile to OverflowError.
    except Exception:
        return None


def may_be_npz(names: Sequence[str]) -> bool:
    """Returns whether an archive with files of these names may be an npz file."""
    return not names or any(name.endswith(".npy") for name in names)


def _kind_of_archive(path: pathlib.Path, names: Sequence[str]) -> str:
    if names and may_be_npz(names):
        return "an npz file. Give it a name that ends in .npz."
    if any(name.endswith("data.pkl") for name in names):
        return pickle_advice(str(path), str(path.with_suffix(".safetensors")))
    first = ", ".join(f"{name:.100}" for name in names[:3]) or "nothing"
    return f"a zip archive without arrays, of {first}. Unpack it first."


def pickle_advice(source: str, target: str) -> str:
    """Returns what a pickle is, and how to make a safetensors file of it."""
    source, target = map(json.dumps, (source, target))
    return (
        "a pickle, such as PyTorch writes; pickles are never read, since that could "
        "run any code. Where PyTorch is installed, these two lines of Python make a "
        "file that is read:\n"
        "  import torch, safetensors.torch; "
        f'x = torch.load({source}, map_location="cpu", weights_only=True)\n'
        '  x = x.get("state_dict") or x.get("model") or x; safetensors.torch.save_file('
        f"{{k: v.float().contiguous().clone() for k, v in x.items()}}, {target})"
    )
