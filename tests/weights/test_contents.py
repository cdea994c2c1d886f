"""Whatever is given for a file of parameters is named, and what to do is typed."""

import gzip
import pickle
import shlex
import subprocess
import sys
import zipfile

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mixer_jax.run.loading import load_model
from mixer_jax.weights.layout import CheckpointError
from mixer_jax.weights.npz import save_checkpoint
from mixer_jax.weights.pytorch import read_pytorch
from mixer_jax.weights.timm import save_timm


def pytorch_archive(path):
    """What torch.save writes, without PyTorch."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("mixer/data.pkl", pickle.dumps({"stem.proj.bias": 1}, 2))
        archive.writestr("mixer/version", "3\n")
        archive.writestr("mixer/data/0", bytes(48))


def zip_of_photos(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("cat/1.jpg", b"\xff\xd8")


KINDS = {
    "empty": (b"", "an empty file"),
    "web page": (b"<!DOCTYPE html>\n<html>", "a web page"),
    "server's error": (b"<?xml version='1.0'?><Error>", "a web page"),
    "JSON": (b'{"error": "Invalid username"}', "a JSON text"),
    "Git LFS": (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer"),
    "text": (b"my weights: see the wiki\n", "a text that begins 'my weights: see"),
    "gzip": (gzip.compress(b"weights"), "compressed"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(90), "an HDF5 file"),
    "old pickle": (pickle.dumps({"a": 1}, 0), "a pickle"),
    "pickle": (pickle.dumps({"a": 1}, 2), "a pickle"),
    "newer pickle": (pickle.dumps({"a": 1}, 4), "a pickle"),
    "PyTorch": (pytorch_archive, "a pickle"),
    "photos": (zip_of_photos, "a zip archive without arrays, of cat/1.jpg"),
}


@pytest.mark.parametrize("ending", ["npz", "safetensors", "pth", "bin", "ckpt"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_file_is_whatever_its_name(tmp_path, kind, ending):
    content, message = KINDS[kind]
    path = tmp_path / f"model.{ending}"
    if callable(content):
        content(path)
    else:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load_model(path)
    assert str(error.value).startswith(f"{path} is no ")
    assert f" but {message}" in str(error.value)


def test_each_format_with_the_name_of_the_other(tiny, tmp_path):
    save_checkpoint(tmp_path / "a.safetensors", tiny.tree())
    save_timm(tmp_path / "a.npz", tiny.tree(), "erf")
    with pytest.raises(CheckpointError, match=r"but an npz file. Give it a name that"):
        load_model(tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"but a safetensors file. Give it a na"):
        load_model(tmp_path / "a.npz")


def test_the_lines_for_pytorch_make_a_file_that_is_read(
    tiny, tmp_path, monkeypatch, assert_same
):
    """With a stand-in for PyTorch that has the functions which the lines call."""
    save_timm(tmp_path / "expected.safetensors", tiny.tree(), "erf")

    class Tensor:
        def __init__(self, array):
            self.array = array

        def float(self):
            return Tensor(self.array.astype(np.float32))

        def contiguous(self):
            return self

        clone = contiguous

    arrays = load_file(tmp_path / "expected.safetensors")
    state_dict = {key: Tensor(x.astype(np.float64)) for key, x in arrays.items()}

    class torch:  # noqa: N801
        @staticmethod
        def load(path, *, map_location, weights_only):
            assert (map_location, weights_only) == ("cpu", True)
            assert path == str(tmp_path / "my model.pth")
            return {"epoch": 3, "state_dict": state_dict}

    class safetensors_torch:  # noqa: N801
        @staticmethod
        def save_file(tensors, path):
            save_file({key: x.array for key, x in tensors.items()}, path)

    import safetensors

    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "safetensors.torch", safetensors_torch)
    monkeypatch.setattr(safetensors, "torch", safetensors_torch, raising=False)
    pytorch_archive(tmp_path / "my model.pth")
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / "my model.pth")
    _, *lines = str(error.value).splitlines()
    assert len(lines) == 2
    exec("\n".join(line.strip() for line in lines), {})
    assert_same(read_pytorch(tmp_path / "my model.safetensors"), tiny.tree())


def write_rounded(tiny, path, dtype):
    """Writes parameters in another dtype, and returns what they are in float32."""
    if path.suffix == ".npz":
        np.savez(path, **{key: x.astype(dtype) for key, x in tiny.flat().items()})
    else:
        save_timm(path, tiny.tree(), "erf")
        save_file({key: x.astype(dtype) for key, x in load_file(path).items()}, path)
    return jax.tree.map(lambda x: x.astype(dtype).astype(np.float32), tiny.tree())


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_half_precision_is_widened_with_one_line(
    tiny, tmp_path, assert_same, caplog, dtype, ending
):
    path = tmp_path / f"low.{ending}"
    expected = write_rounded(tiny, path, dtype)
    found = load_model(path).params
    assert_same(found, expected)
    count = len(tiny.flat())
    name = np.dtype(dtype).name
    assert caplog.messages == [
        f"{path}: {count} of {count} arrays are in {name}; they were widened to float32"
    ]


@pytest.mark.parametrize("dtype", [np.float64, np.int32])
@pytest.mark.parametrize("ending", ["npz", "safetensors"])
def test_the_command_that_converts_to_float32_works(
    tiny, tmp_path, assert_same, dtype, ending
):
    path = tmp_path / f"it is high.{ending}"
    expected = write_rounded(tiny, path, dtype)
    with pytest.raises(CheckpointError, match=r"expected .*float32") as error:
        load_model(path)
    _, command = str(error.value).splitlines()
    python, *arguments = shlex.split(command)
    assert python == "python"
    subprocess.run([sys.executable, *arguments], check=True)
    found = load_model(tmp_path / f"it is high-float32.{ending}").params
    assert_same(found, expected)
