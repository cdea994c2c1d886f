import json
import shutil
import time

import pytest

from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.fingerprint import changes, fingerprint

from ..examples import touch_folder, write_folder


def of(path, *expressions, **options):
    return fingerprint(open_dataset(str(path), **options), expressions)


@pytest.fixture
def photos(tmp_path):
    return write_folder(
        tmp_path / "photos", {"train/a": 3, "train/b": 3, "test/a": 1, "test/b": 1}
    )


def test_it_is_small_and_survives_json(photos):
    found = of(photos)
    assert json.loads(json.dumps(found)) == found
    assert len(json.dumps(found)) < 600
    assert found["splits"]["train"]["count"] == 6
    assert found["classes"]["count"] == 2
    assert changes(found, json.loads(json.dumps(found))) == []


def test_where_the_folder_is_does_not_count(photos, tmp_path, monkeypatch):
    before = of(photos)
    moved = shutil.copytree(photos, tmp_path / "elsewhere/deep/photos")
    assert of(moved) == before
    monkeypatch.chdir(moved.parent)
    assert of("photos") == of("./photos/") == of(f"{moved}/") == before
    (tmp_path / "link").symlink_to(moved)
    assert of(tmp_path / "link") == before
    # Nor does a folder around it.
    assert of(moved.parent) == before


def test_how_a_table_writes_its_paths_does_not_count(photos, monkeypatch):
    paths = sorted(photos.rglob("train/*/*.*"))
    for name, base in (("relative", photos), ("absolute", None)):
        rows = [
            f"{x.relative_to(base) if base else x},{x.parent.name},train" for x in paths
        ]
        text = "\n".join(["path,label,split", *rows, ""])
        (photos / f"{name}.csv").write_text(text)
    expected = of(photos / "relative.csv")
    assert of(photos / "absolute.csv") == expected
    monkeypatch.chdir(photos)
    assert of("absolute.csv") == of("relative.csv") == expected


def add(root):
    shutil.copy(root / "train/a/000.jpg", root / "train/a/new.jpg")


def swap(root):
    (root / "train/a").rename(root / "train/x")
    (root / "train/b").rename(root / "train/a")
    (root / "train/x").rename(root / "train/b")


def rename(root):
    (root / "train/a/000.jpg").rename(root / "train/a/zzz.jpg")


def grow(root):
    with (root / "train/a/000.jpg").open("ab") as file:
        file.write(b"\0")


def rename_class(root):
    for split in ("train", "test"):
        (root / split / "a").rename(root / split / "A")


def add_class(root):
    touch_folder(root, {"train/c": 1})


def add_split(root):
    touch_folder(root, {"val/a": 1})


@pytest.mark.parametrize(
    ("change", "lines"),
    [
        (add, ["train: 6 images before, 7 now"]),
        (swap, ["train: 6 images as before, with other sizes, contents"]),
        (rename, ["train: 6 images as before, with other names, sizes, contents"]),
        (grow, ["train: 6 images as before, with other sizes"]),
        (
            rename_class,
            [
                "classes: 2 classes as before, with other names",
                "test: 2 images as before, with other names",
                "train: 6 images as before, with other names",
            ],
        ),
        (
            add_class,
            ["classes: 2 classes before, 3 now", "train: 6 images before, 7 now"],
        ),
        (add_split, ["val: new"]),
    ],
)
def test_what_changed_is_said(photos, change, lines):
    before = of(photos)
    change(photos)
    after = of(photos)
    assert changes(before, after) == lines
    assert changes(before, before) == []


def test_classes_whose_files_have_equal_names_and_sizes_and_are_swapped(tmp_path):
    for name, level in (("a", b"\0"), ("b", b"\1")):
        (tmp_path / name).mkdir()
        for i in range(3):
            (tmp_path / name / f"{i}.bmp").write_bytes(b"BM" + level * 9000)
    before = of(tmp_path)
    (tmp_path / "a").rename(tmp_path / "x")
    (tmp_path / "b").rename(tmp_path / "a")
    (tmp_path / "x").rename(tmp_path / "b")
    assert changes(before, of(tmp_path)) == [
        "train: 6 images as before, with other contents"
    ]


def test_labels_of_a_table_count(tmp_path):
    touch_folder(tmp_path, {"i": 4})

    def table(*labels):
        rows = [f"i/{i}.png,{label}" for i, label in enumerate(labels)]
        (tmp_path / "t.csv").write_text("\n".join(["path,label", *rows]))
        return of(tmp_path / "t.csv")

    before = table("a", "b", "a", "b")
    assert changes(before, table("b", "a", "a", "b")) == [
        "train: 4 images as before, with other labels"
    ]
    several = table("a|b", "b", "a", "b")
    assert changes(before, several) == ["train: 4 images as before, with other labels"]
    assert changes(before, table("a", "b", "a", "b")) == []


def test_expressions_count(photos):
    found = of(photos, "train[:50%]", "train[50%:]")
    assert list(found["splits"]) == ["train[:50%]", "train[50%:]"]
    assert found == of(photos, "train[:50%]", "train[50%:]")
    add(photos)
    assert len(changes(found, of(photos, "train[:50%]", "train[50%:]"))) >= 1


def test_missing_files_are_no_error(tmp_path):
    touch_folder(tmp_path, {"i": 1})
    (tmp_path / "t.csv").write_text("path,label\ni/0.png,a\ni/1.png,b\n")
    before = of(tmp_path / "t.csv")
    touch_folder(tmp_path, {"i": 2})
    assert changes(before, of(tmp_path / "t.csv")) == [
        "train: 2 images as before, with other sizes"
    ]


def test_names_that_are_not_utf8(tmp_path):
    root = touch_folder(tmp_path, {"train/a": 1, "train/b": 1})
    path = bytes(root / "train/a") + b"/caf\xe9.png"
    with open(path, "wb") as file:
        file.write(b"x")
    assert of(root)["splits"]["train"]["count"] == 3


def test_digits_and_tfds(tfds_dir):
    digits = of("digits")
    assert digits == of("digits")
    assert digits["splits"]["train"]["count"] == 1433
    shapes = of("tiny_shapes", data_dir=tfds_dir)
    assert shapes == of("tiny_shapes:1.0.0", data_dir=tfds_dir)
    assert shapes["splits"]["test"]["count"] == 14
    part = of("tiny_shapes", "train[:75%]", data_dir=tfds_dir)
    assert part["splits"]["train[:75%]"]["count"] == 30
    assert changes(shapes, digits)


@pytest.mark.slow
def test_100_000_files_take_seconds(tmp_path):
    root = touch_folder(tmp_path, {f"train/{i:03}": 1000 for i in range(100)})
    start = time.monotonic()
    dataset = open_dataset(str(root))
    listed = time.monotonic()
    fingerprint(dataset)
    assert time.monotonic() - listed < 20
    assert listed - start < 20
