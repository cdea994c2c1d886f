import logging
import pathlib

import pytest

from mixer_jax.data.dataset import DatasetError, open_dataset
from mixer_jax.data.walk import find_images

from ..examples import labels, write_folder


def test_folder_with_every_ending_and_one_class_list(tmp_path):
    root = write_folder(
        tmp_path, {"train/cat": 4, "train/dog": 5, "test/cat": 2, "test/dog": 2}
    )
    dataset = open_dataset(str(root))
    assert dataset.class_names == ["cat", "dog"]
    train = dataset.split("train")
    assert labels(train) == [0] * 4 + [1] * 5
    assert {pathlib.Path(train[i].name).suffix for i in range(9)} == {
        ".jpg",
        ".PNG",
        ".webp",
        ".JPEG",
    }
    assert all(train[i].pixels().shape == (90, 120, 3) for i in range(9))


def test_class_of_only_one_split_keeps_the_labels_equal_and_is_told(tmp_path, caplog):
    root = write_folder(
        tmp_path, {"train/a": 1, "train/b": 1, "test/b": 1, "test/c": 1}
    )
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(root))
    assert dataset.class_names == ["a", "b", "c"]
    assert labels(dataset.split("train")) == [0, 1]
    assert labels(dataset.split("test")) == [1, 2]
    assert "1 of 3 classes have no image in train: c" in caplog.text
    assert "1 of 3 classes have no image in test: a" in caplog.text


def test_other_files_are_counted_and_hidden_ones_ignored(tmp_path, caplog):
    root = write_folder(tmp_path, {"train/a": 2, "test/a": 1})
    (root / "train/a/notes.txt").write_text("x")
    (root / "train/a/._000.jpg").write_text("x")
    (root / "train/.hidden").mkdir()
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(root))
    assert len(dataset.split("train")) == 2
    assert dataset.class_names == ["a"]
    assert "ignored 1 files" in caplog.text
    assert "1 .txt" in caplog.text


def test_folder_without_splits_is_all_train(tmp_path):
    root = write_folder(tmp_path, {"cat/kittens": 6, "cat/old": 4, "dog": 10})
    dataset = open_dataset(str(root))
    assert len(dataset.split("train")) == 20
    train, test = dataset.split("train[:80%]"), dataset.split("train[80%:]")
    assert (len(train), len(test)) == (16, 4)
    with pytest.raises(DatasetError, match=r"no split 'test'.*train\[90%:\]"):
        dataset.split("test")


def test_table_of_paths_and_labels(tmp_path):
    write_folder(tmp_path, {"images": 4})
    files = sorted(path.name for path in (tmp_path / "images").iterdir())
    table = tmp_path / "labels.csv"
    rows = [f"images/{f},{'odd' if i % 2 else 'even'}" for i, f in enumerate(files)]
    table.write_text("\n".join(["path,label", *rows]))
    dataset = open_dataset(str(table))
    assert dataset.class_names == ["even", "odd"]
    assert labels(dataset.split("train")) == [0, 1, 0, 1]
    tabs = tmp_path / "labels.TSV"
    rows = [f"images/{f}\tx\t{'test' if i else 'train'}" for i, f in enumerate(files)]
    tabs.write_text("\n".join(["path\tlabel\tsplit", *rows]))
    dataset = open_dataset(str(tabs))
    assert (len(dataset.split("train")), len(dataset.split("test"))) == (1, 3)
    assert dataset.split("test")[0].pixels().shape == (90, 120, 3)


def test_table_without_its_columns(tmp_path):
    table = tmp_path / "labels.csv"
    table.write_text("file,class\na.jpg,x\n")
    with pytest.raises(DatasetError, match=r"\['file', 'class'\].*path and label"):
        open_dataset(str(table))


def test_empty_folder(tmp_path):
    (tmp_path / "train" / "cat").mkdir(parents=True)
    with pytest.raises(DatasetError, match="no images in train"):
        open_dataset(str(tmp_path))


def test_split_folder_without_images_is_left_out_and_told(tmp_path, caplog):
    root = write_folder(tmp_path, {"train/a": 1, "test/a": 1, "notes/figures": 0})
    (root / "notes/figures/readme.txt").write_text("x")
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(root))
    assert dataset.class_names == ["a"]
    assert list(dataset.split_names) == ["test", "train"]
    assert "no images in notes; left out" in caplog.text


def test_images_outside_of_class_folders_are_told(tmp_path, caplog):
    root = write_folder(tmp_path, {"train/a": 1, "test/a": 1})
    (root / "train/loose.jpg").touch()
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(str(root)).split("train")) == 1
    assert "left out 1 images that are not in a class folder" in caplog.text
    assert "loose.jpg" in caplog.text


def test_split_folders_of_other_names_are_not_taken_for_classes(tmp_path):
    root = write_folder(tmp_path, {"Training/a": 1, "Testing/a": 1})
    with pytest.raises(DatasetError, match="folders Testing, Training, but no train"):
        open_dataset(str(root))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\n", "no lines below the header"),
        (b"path;label\na.jpg;x\n", r"\['path;label'\].*separated by ','"),
        (b"path,label\n,x\n", "line 2: found .* Expected a path and a label"),
        (b"path,label\nnot/here.jpg,x\n", r"line 2: there is no file .*not/here.jpg"),
        (b"path,label\n\xe9.jpg,x\n", "is not a UTF-8 table"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    with pytest.raises(DatasetError, match=message):
        open_dataset(str(table))


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
    assert len(trained_on) == 7
    # The order of the training stream: files before subfolders, each sorted.
    assert [x.removeprefix(f"{photos}/") for x in trained_on[1:]] == [
        *("a.png", "b.PNG", "f.png", "c/d.png", "c/e.webp", "link/g.jpg")
    ]
