import json
import os

import jax
import numpy as np
import pytest

from mixer_jax.training import manifest
from mixer_jax.training.manifest import METADATA, DamagedError

ARRAYS = {
    "params": {"kernel": np.arange(6.0, dtype="f4").reshape(2, 3)},
    "step": np.array(7, "i4"),
}


@pytest.fixture
def folder(tmp_path):
    """Has a file, one in a folder, and the one to which Orbax adds the time."""
    (tmp_path / "a").write_bytes(b"abc")
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "b").write_bytes(bytes(range(256)))
    (tmp_path / METADATA).write_text("{}")
    manifest.write_manifest(tmp_path, manifest.hash_arrays(ARRAYS), {"steps": 3})
    return tmp_path


def check(folder):
    manifest.check_files(folder, manifest.read_manifest(folder))


def test_what_may_change(folder):
    check(folder)
    (folder / METADATA).write_text('{"commit_timestamp_nsecs": 1}')
    (folder / "d" / "notes.txt").write_text("mine")
    check(folder)


@pytest.mark.parametrize(
    ("name", "contents", "message"),
    [
        ("a", None, "a is not there"),
        ("a", b"", "a has 0 bytes, expected 3"),
        ("a", b"abd", "a has other contents"),
        ("d/b", bytes(256), "d/b has other contents"),
        ("manifest.json", b"", "manifest.json is not as it was written"),
        ("manifest.json", b"[]", "manifest.json is not as it was written"),
        ("manifest.json", b"{}", "manifest.json is not as it was written"),
        ("manifest.json", b"\xff", "manifest.json is not as it was written"),
    ],
)
def test_what_is_damaged_is_named(folder, name, contents, message):
    if contents is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(contents)
    with pytest.raises(DamagedError, match=message):
        check(folder)


def test_no_byte_of_a_manifest_can_change(folder):
    """But for white space."""
    path = folder / "manifest.json"
    text = path.read_text()
    for i in range(0, len(text), 5):
        path.write_text(text[:i] + chr(ord(text[i]) ^ 1) + text[i + 1 :])
        if not text[i].isspace():
            with pytest.raises(DamagedError, match=r"manifest\.json is not as"):
                manifest.read_manifest(folder)


def test_no_file_outside_the_folder_is_read(folder, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside") / "a"
    (folder / "a").rename(outside)
    (folder / "a").symlink_to(outside)
    with pytest.raises(DamagedError, match="a is not there"):
        check(folder)
    (folder / "inside").symlink_to(folder / "d")
    os.mkfifo(folder / "pipe")  # which nobody writes to
    for name in ("../outside0/a", str(outside), "inside/b", "d/../d/b", "pipe", "\0"):
        found = manifest.Manifest({name: [3, ""]}, {}, {})
        with pytest.raises(DamagedError, match="is not there"):
            manifest.check_files(folder, found)


def test_one_bit_of_an_array(folder):
    found = manifest.read_manifest(folder)
    manifest.check_arrays(ARRAYS, found)
    manifest.check_arrays(jax.tree.map(jax.numpy.asarray, ARRAYS), found)
    manifest.check_arrays({"step": ARRAYS["step"]}, found)
    changed = jax.tree.map(np.copy, ARRAYS)
    changed["params"]["kernel"].view("u4")[1, 2] ^= 1
    with pytest.raises(DamagedError, match="params/kernel has other values"):
        manifest.check_arrays(changed, found)
    # Read as another type, an array has other bytes and is none the worse.
    changed["params"]["kernel"] = ARRAYS["params"]["kernel"].astype("f2")
    manifest.check_arrays(changed, found)


def test_a_manifest_says_what_anyone_can_check(folder):
    content = json.loads((folder / "manifest.json").read_text())
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert content["files"]["a"] == [3, sha256]
    assert content["arrays"].keys() == {"params/kernel", "step"}
    assert content["arrays"]["params/kernel"].startswith("float32[2,3] ")
    assert manifest.read_manifest(folder / "d") is None
