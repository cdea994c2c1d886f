"""What cannot be written is one message, and leaves nothing half-written."""

import errno
import os

import pytest

from mixer_jax.files import (
    DiskError,
    remove_partial,
    replace_folder_when_whole,
    replace_when_whole,
    writing,
)


def test_a_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "final.npz"
    path.write_text("old")

    def write():
        with replace_when_whole(path) as partial:
            partial.symlink_to("/dev/full")
            partial.write_text("new")

    with pytest.raises(DiskError) as caught:
        write()
    assert str(caught.value) == (
        f"{path} cannot be written: No space left on device. Make room on that disk; "
        "then give the same command again."
    )
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EROFS, "…", "/w/checkpoints/3"), "Read-only .* disk writable"),
        (OSError(errno.EDQUOT, "…"), "Disk quota exceeded. Make room"),
        (OSError(errno.EIO, "…"), "Input/output error. See to its disk"),
        (
            ValueError("RESOURCE_EXHAUSTED: Failed writing [os_error_code='28']"),
            "No space left on device. Make room",
        ),
    ],
)
def test_what_a_disk_refuses_names_the_place_and_what_to_do(error, message):
    with (
        pytest.raises(DiskError, match=f"^/w/checkpoints cannot be .*{message}") as e,
        writing("/w/checkpoints"),
    ):
        raise error
    assert e.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, "No such file", "/elsewhere/photo.jpg"),
        ValueError("shapes differ"),
        OSError("a message of its own"),
        ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"),
        DiskError("said already"),
    ],
)
def test_other_errors_stay_as_they_are(error):
    with pytest.raises(type(error)) as caught, writing("/w/checkpoints"):
        raise error
    assert caught.value is error


def test_a_folder_on_a_full_disk_leaves_nothing(tmp_path):
    def write():
        with replace_folder_when_whole(tmp_path / "model", lambda _: True) as partial:
            (partial / "weights").symlink_to("/dev/full")
            (partial / "weights").write_text("new")

    with pytest.raises(DiskError, match="model cannot be written: No space left"):
        write()
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_is_removed(tmp_path):
    """And nothing else, whatever its name."""
    mark = f"{32 * 'a'}.partial"
    kept = ["final.npz", "final.npz.0a1b.partial", f"mine.{mark}", "notes.partial"]
    for name in (f"final.npz.{mark}", *kept):
        (tmp_path / name).write_text(name)
    (tmp_path / f"out.npz.{mark}").mkdir()  # as of a folder that is being written
    remove_partial(tmp_path, "final.npz", "out.npz")
    assert sorted(x.name for x in tmp_path.iterdir()) == [*kept, f"out.npz.{mark}"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, seen = tmp_path / "config.json", []

    def fsync(file):
        name = os.readlink(f"/proc/self/fd/{file}")
        seen.append((name.startswith(f"{path}."), name, path.exists()))

    monkeypatch.setattr(os, "fsync", fsync)
    with replace_when_whole(path) as partial:
        partial.write_text("new")
    assert seen == [(True, str(partial), False), (False, str(tmp_path), True)]
