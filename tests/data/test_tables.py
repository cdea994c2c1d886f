import logging

import numpy as np
import pytest

from mixer_jax.data.check import check_images, summarize, warnings
from mixer_jax.data.dataset import DatasetError, first_of_each_class, open_dataset

from ..examples import labels, names, touch_folder, write_folder


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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"path,label\n", "no lines below the header"),
        (b"path;label\na.jpg;x\n", r"\['path;label'\].*separated by ','"),
        (b"path,label\n,x\n", "line 2: found .* Expected a path and a label"),
        (b"path,label\nnot/here.jpg,x\n", r"line 2: there is no file .*not/here.jpg"),
        (b"path,label\n\xe9.jpg,x\n", "is not a UTF-8 table"),
        (b"path,label\na\0.jpg,x\n", r"line 2: found \['a\\x00.jpg', 'x'\]"),
        # The lines below would be part of the cell.
        (
            b'path,label\n"a.jpg,x\nb.jpg,x\n',
            "line 2: unexpected end of data. .* Close the quotes in line 2",
        ),
        (b'path,label\n"a.jpg,x\n"b.jpg",x\n', "line 2: ',' expected after"),
        (b'path,label\n"' + b"x" * 200_000, r"line 2: field larger than field limit"),
        (b",".join([b"x"] * 10**6), r"the first line is \['x', .*'…'\]. Expected"),
    ],
)
def test_bad_tables(tmp_path, content, message):
    table = tmp_path / "labels.csv"
    table.write_bytes(content)
    with pytest.raises(DatasetError, match=message) as caught:
        open_dataset(str(table))
    assert len(str(caught.value)) < 1000


def test_paths_that_lead_out_of_the_folder_are_told(tmp_path, caplog):
    folder = tmp_path / "tables"
    folder.mkdir()
    write_folder(tmp_path, {"images": 3})
    a, b, c = sorted((tmp_path / "images").iterdir())
    (folder / "link.png").symlink_to(c)
    rows = [f"{a},x", f"../images/{b.name},y", "link.png,x", "sub/../link.png,x"]
    (folder / "t.csv").write_text("\n".join(["path,label", *rows]))
    with caplog.at_level(logging.WARNING):
        source = open_dataset(str(folder / "t.csv")).split("train")
    assert [source[i].pixels().shape for i in range(3)] == [(90, 120, 3)] * 3
    assert f"2 paths are absolute or lead out of the table's folder: {a}" in caplog.text


def write_table(root, text, name="table.csv"):
    touch_folder(root, {"i": 9})
    (root / name).write_bytes(text.encode("utf-8"))
    return str(root / name)


def test_labels_and_splits_are_cleaned(tmp_path, caplog):
    table = write_table(
        tmp_path,
        " Path, Label,SPLIT\n"
        "i/0.png,cat,Train\ni/1.png, cat ,Train\ni/2.png,Cafe\u0301,TRAIN\n"
        "i/3.png,Caf\u00e9,test\ni/4.png,cat,holdout\ni/5.png,cat,\n",
    )
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(table)
    assert dataset.class_names == ["Caf\u00e9", "cat"]
    assert labels(dataset.split("train")) == [1, 1, 0, 1]
    assert labels(dataset.split("test")) == [0]
    assert labels(dataset.split("holdout")) == [1]
    for line in (
        "' cat ' and 'cat'",
        "'Train' and 'TRAIN' are taken for one, 'Train'",
        "1 rows without a split are taken for 'Train'",
        "'holdout' (1 rows)",
    ):
        assert line in caplog.text, line


def test_blanks_around_quotes_are_no_part_of_a_cell(tmp_path):
    text = 'path,label\n"i/0.png" ,"x, y" \r\n"i/1.png"  ,"say ""z"""\n'
    dataset = open_dataset(write_table(tmp_path, text))
    assert dataset.class_names == ['say "z"', "x, y"]
    assert labels(dataset.split("train")) == [1, 0]


def test_no_split_column_needs_no_word(tmp_path, caplog):
    table = write_table(tmp_path, "path,label\ni/0.png,a\ni/1.png,b\n")
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(table).split("train")) == 2
    assert not caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,label\na, b.png,x\n", "line 2: found 3 cells"),
        ("path,label,label\ni/0.png,x,y\n", "each once"),
        ("path,label\ni/0.png, \n", "line 2: found no label for i/0.png"),
        ("path,label,split\ni/0.png,x,test\n", "'test'. Expected one .* called train"),
        ("path,label\ni\\0.png,x\n", "/ for the backslash"),
        ("path,label\n\n\n", "no lines below the header"),
        ("", "the first line is"),
    ],
)
def test_tables_that_would_be_misread(tmp_path, text, message):
    with pytest.raises(DatasetError, match=message):
        open_dataset(write_table(tmp_path, text))


def test_images_of_several_rows_are_told(tmp_path, caplog):
    table = write_table(
        tmp_path,
        "path,label,split\ni/0.png,a,train\ni/1.png,b,train\n./i/0.png,b,train\n"
        "i/1.png,b,test\ni/2.png,b,train\n",
    )
    with caplog.at_level(logging.WARNING):
        assert len(open_dataset(table).split("train")) == 4
    assert "2 rows name an image that an earlier row has: 1 with another label, 1" in (
        caplog.text
    )


def test_several_labels_in_a_cell(tmp_path, caplog):
    root = write_folder(tmp_path, {"i": 4})
    files = sorted(x.name for x in (root / "i").iterdir())
    cells = ["cat|dog", "dog", "", "owl | cat | owl"]
    table = root / "t.csv"
    rows = [f"i/{file},{cell}" for file, cell in zip(files, cells, strict=True)]
    table.write_text("\n".join(["path,label", *rows]))
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(str(table))
    assert "'|' separates labels; images have several, such as 'cat|dog'" in caplog.text
    assert dataset.class_names == ["cat", "dog", "owl"]
    source = dataset.split("train")
    assert labels(source) == [(0, 1), (1,), (), (2, 0)]
    parts = dataset.split("train[:50%]"), dataset.split("train[50%:]")
    assert names(parts[0]) | names(parts[1]) == names(source)
    assert all(isinstance(x, tuple) for part in parts for x in labels(part))
    assert len(dataset.split("train[:50%]+train[50%:]")) == 4
    checked = list(check_images("train", source))
    assert [x.error for x in checked] == [None] * 4
    assert ("train", "(no label)", "1") in {
        row[:3] for row in summarize(checked, dataset.class_names)
    }
    warnings(checked, dataset.class_names)
    with pytest.raises(DatasetError, match="one label"):
        first_of_each_class(source, 3, 1)


def test_several_labels_in_batches(tmp_path):
    from mixer_jax.data.pipeline import eval_batches
    from mixer_jax.data.preprocess import EvalTransform

    write_folder(tmp_path, {"i": 2})
    files = sorted(x.name for x in (tmp_path / "i").iterdir())
    text = f"path,label\ni/{files[0]},a|c\ni/{files[1]},b\n"
    (tmp_path / "t.csv").write_text(text)
    dataset = open_dataset(str(tmp_path / "t.csv"))
    batches = eval_batches(
        dataset.split("train"), EvalTransform(8), batch_size=2, num_classes=3
    )
    try:
        label = next(batches)["label"]
    finally:
        batches.close()
    np.testing.assert_array_equal(label, [[1, 0, 1], [0, 1, 0]])


def test_a_class_list_beside_the_table(tmp_path, caplog):
    table = write_table(tmp_path, "path,label\ni/0.png,b\ni/1.png, a|b \n")
    (tmp_path / "classes.txt").write_text("b\nc\na|b\n")
    with caplog.at_level(logging.WARNING):
        dataset = open_dataset(table)
    assert dataset.class_names == ["b", "c", "a|b"]
    assert labels(dataset.split("train")) == [0, 2]  # a|b is the name of one class
    assert "gives the 3 classes and their order" in caplog.text
    (tmp_path / "classes.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(DatasetError, match=r"classes.txt is not a UTF-8 text"):
        open_dataset(table)
