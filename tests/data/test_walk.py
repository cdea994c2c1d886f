import logging
import os

import pytest

from mixer_jax.data import walk
from mixer_jax.data.dataset import DatasetError, open_dataset
from mixer_jax.data.walk import find_images, scan

from ..examples import touch_folder


@pytest.fixture
def photos(tmp_path):
    """A folder with images, hidden files, a link and other files."""
    files = ["a.png", "b.PNG", "c/d.png", "c/e.webp", "f.png", "notes.txt", "._a.png"]
    files += [".ipynb_checkpoints/a-checkpoint.png", "c/.thumbnails/d.png"]
    for file in [*(f"photos/{x}" for x in files), "elsewhere/g.jpg"]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (tmp_path / "photos/link").symlink_to(tmp_path / "elsewhere")
    return tmp_path / "photos"


def test_find_images(photos):
    def find(*patterns):
        found = find_images([str(photos / x) for x in patterns])
        return [x.removeprefix(f"{photos}/") for x in found]

    everything = ["a.png", "b.PNG", "c/d.png", "c/e.webp", "f.png", "link/g.jpg"]
    assert find(".") == everything
    assert find("f.png", "*.png", "c") == ["f.png", "a.png", "c/d.png", "c/e.webp"]
    assert find("**/*.png") == ["a.png", "c/d.png", "f.png"]
    assert find("c*") == ["c/d.png", "c/e.webp"]  # a folder that a glob matches
    # A glob is for images, like a folder. A file given by its name is always taken.
    assert sorted(find("*")) == everything
    assert find("notes.txt", "._a.png") == ["notes.txt", "._a.png"]
    with pytest.raises(FileNotFoundError, match=r"x/\*\.png: no such file"):
        find("a.png", "x/*.png")


def test_relative_paths_stay_short(photos, monkeypatch):
    monkeypatch.chdir(photos)
    assert find_images(["./a.png", ".", "a.png"])[:2] == ["a.png", "b.PNG"]
    assert find_images(["./c"]) == ["c/d.png", "c/e.webp"]


def test_prediction_finds_the_images_that_training_reads(photos):
    dataset = open_dataset(str(photos.parent))
    assert dataset.class_names == ["elsewhere", "photos"]
    source = dataset.split("train")
    trained_on = [source[i].name for i in range(len(source))]
    assert sorted(trained_on) == find_images([str(photos.parent)])
    assert len(trained_on) == 6
    # The order of the training stream: files before subfolders, each sorted. The link
    # leads to a file of the other class, and a file has one class.
    assert [x.removeprefix(f"{photos}/") for x in trained_on[1:]] == [
        *("a.png", "b.PNG", "f.png", "c/d.png", "c/e.webp")
    ]


def paths(root):
    return [os.path.relpath(file.path, root) for file in scan(root).walk()]


@pytest.mark.parametrize("target", ["../../train", "..", ".", "{root}", "/"])
def test_links_up_the_tree_are_left_out_and_told(tmp_path, caplog, target):
    root = touch_folder(tmp_path / "photos", {"train/cat": 2, "train/dog": 1})
    (root / "train/cat/all").symlink_to(target.format(root=root))
    with caplog.at_level(logging.WARNING):
        found = paths(root)
    assert found == ["train/cat/0.png", "train/cat/1.png", "train/dog/0.png"]
    assert "left out 1 links to a folder that they are in" in caplog.text
    assert "train/cat/all -> " in caplog.text


def test_cycles_outside_of_the_folder_are_found(tmp_path):
    touch_folder(tmp_path, {"photos/cat": 1, "pool/a": 1, "pool/b": 1})
    (tmp_path / "photos/cat/pool").symlink_to(tmp_path / "pool")
    (tmp_path / "pool/a/back").symlink_to(tmp_path / "photos")
    (tmp_path / "pool/b/a").symlink_to(tmp_path / "pool/a")
    # pool/a is listed as itself and through pool/b, and ends both times at its link.
    assert paths(tmp_path / "photos") == [
        *("cat/0.png", "cat/pool/a/0.png", "cat/pool/b/0.png", "cat/pool/b/a/0.png")
    ]
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "photos")  # the folder itself may be a link
    assert len(paths(link)) == 4
    assert len(find_images([str(link)])) == 3  # each file once


def test_links_that_lead_nowhere_do_not_stop_the_walk(tmp_path):
    root = touch_folder(tmp_path, {"cat": 1})
    (root / "cat/gone.png").symlink_to(root / "nothing")
    (root / "cat/self.png").symlink_to(root / "cat/self.png")
    os.mkfifo(root / "cat/pipe.png")  # would block whoever reads it
    assert paths(root) == ["cat/0.png", "cat/gone.png", "cat/self.png"]


def test_predict_reads_no_file_twice_through_links(tmp_path, caplog):
    root = touch_folder(tmp_path / "photos", {"cat": 2, "dog": 1})
    (root / "cat/all").symlink_to("../../photos")
    (root / "cat/dog").symlink_to("../dog")
    with caplog.at_level(logging.WARNING):
        found = find_images([str(root)])
    assert [os.path.relpath(x, root) for x in found] == [
        *("cat/0.png", "cat/1.png", "dog/0.png")
    ]
    assert "left out 1 links to images that are there already" in caplog.text


def test_folders_of_other_programs_are_left_out_and_told(tmp_path, caplog):
    root = touch_folder(tmp_path, {"cat": 1, "cat/@eaDir": 1, "__MACOSX/cat": 1})
    (root / "cat/._0.png").touch()
    with caplog.at_level(logging.WARNING):
        assert paths(root) == ["cat/0.png"]
    assert "left out 2 folders of other programs" in caplog.text
    assert "left out 1 hidden images" in caplog.text


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, monkeypatch):
    root = touch_folder(tmp_path, {"cat": 1, "dog": 1})
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DatasetError, match=f"{root}/dog: cannot list .*denied"):
        open_dataset(str(root))


def test_names_sort_alike_on_every_system(tmp_path):
    """Decomposed, as macOS writes it, an e with an accent would come before f."""
    for i, form in enumerate(("e\u0301.png", "\u00e9.png")):
        root = touch_folder(tmp_path / str(i), {})
        root.mkdir()
        for name in (form, "f.png", "z.png"):
            (root / name).touch()
        assert [x[-5] for x in paths(root)][:2] == ["f", "z"]


def test_links_to_what_is_not_there_are_told(tmp_path, caplog):
    root = touch_folder(tmp_path, {"train/a": 2, "train/b": 2})
    (root / "train/c").symlink_to("/not/there/c")
    (root / "train/loop").symlink_to("loop")
    (root / "test").symlink_to("/not/there")
    (root / "train/a/lost.jpg").symlink_to("/not/there.jpg")
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(root))
    assert dataset.class_names == ["a", "b"]
    assert "left out 3 links to what is not there" in caplog.text
    assert f"{root}/train/c -> /not/there/c" in caplog.text
    assert len(dataset.split("train")) == 5  # a lost image is told when it is read
    (tmp_path / "all").symlink_to("/not/there")
    with pytest.raises(DatasetError, match=r"The link leads to '/not/there', which"):
        open_dataset(str(tmp_path / "all"))


def test_a_table_in_a_folder_is_told(tmp_path, caplog):
    root = touch_folder(tmp_path, {"a": 2, "b": 2})
    (root / "labels.csv").write_text("path,label\n")
    with caplog.at_level(logging.WARNING):
        open_dataset(str(root))
    assert (
        f"to use it, name it in place of the folder: {root}/labels.csv" in caplog.text
    )


def test_links_that_make_endless_folders_are_an_error(tmp_path, monkeypatch):
    """Each of 40 folders has two links to the next one: 2**40 ways to the last."""
    for i in range(40):
        folder = tmp_path / "dataset" / f"{i}"
        folder.mkdir(parents=True)
        for name in "ab":
            (folder / name).symlink_to(f"../{i + 1}")
    (tmp_path / "dataset" / "40").mkdir()
    monkeypatch.setattr(walk, "MAX_VISITS", 99)
    with pytest.raises(DatasetError, match="more than 99 ways lead to the folder"):
        scan(tmp_path / "dataset")


def test_folders_in_one_another_without_end_are_an_error(tmp_path):
    (tmp_path / "/".join(["x"] * 120)).mkdir(parents=True)
    with pytest.raises(DatasetError, match="more than 100 folders lie in one another"):
        scan(tmp_path)
