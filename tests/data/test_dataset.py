import pytest
from PIL import Image

from mixer_jax.data.dataset import (
    DatasetError,
    Example,
    default_splits,
    first_of_each_class,
    open_dataset,
    usual_for,
)

from ..examples import labels, photographs, touch_folder, write_folder


def test_path_that_is_not_there():
    with pytest.raises(DatasetError, match=r"'/no/such/folder'.*train/<class>/<image>"):
        open_dataset("/no/such/folder")


def test_unknown_name_suggests_one():
    with pytest.raises(DatasetError, match=r"Did you mean .*'cifar10'"):
        open_dataset("cifar11")


@pytest.mark.parametrize(
    "name",
    [
        *("my-photos", "my photos", "data/raw/photos", "data\\raw\\photos", "a:b"),
        *("", "  ", "https://example.org/photos.zip", "gs://bucket/x", "user/repo"),
        *("huggingface:mnist", "photos.csv", "../photos", "~/no such", "cifar11"),
    ],
)
def test_a_mistyped_name_ends_in_one_message(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DatasetError) as caught:
        open_dataset(name)
    message = str(caught.value)
    assert len(message.splitlines()) == 1
    assert len(message) < 600
    assert "train/<class>/<image>" in message
    if name.strip() and "://" not in name and name[0] not in "~.":
        assert str(tmp_path / name) in message.replace("\\\\", "\\")


def test_close_names_of_folders_and_datasets_are_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Cifar-12").mkdir()
    (tmp_path / "data/photos").mkdir(parents=True)
    with pytest.raises(DatasetError, match=r"/Cifar-12' or 'cifar10"):
        open_dataset("cifar-11")
    with pytest.raises(DatasetError, match=r"Did you mean '.*/data/photos'\?"):
        open_dataset("data/photo")
    with pytest.raises(DatasetError, match=r"data holds no 'raw'"):
        open_dataset("data/raw/photos")
    with pytest.raises(DatasetError, match="with / for the backslash"):
        open_dataset("data\\photos")
    with pytest.raises(DatasetError, match="'digits'"):
        open_dataset("digit")


def test_a_file_that_is_no_table(tmp_path):
    (tmp_path / "photos.zip").touch()
    with pytest.raises(DatasetError, match=r"neither .csv nor .tsv.*unpacked"):
        open_dataset(str(tmp_path / "photos.zip"))


@pytest.mark.parametrize(
    "name",
    [
        *("cifar10", "Cifar10", "CIFAR10", "cifar-10", " cifar10", "cifar10:3.0.2"),
        *("cifar10:3.*.*", "cifar10/plain_text", "CIFAR10:3.0.2"),
    ],
)
def test_every_spelling_has_what_is_usual(name):
    assert default_splits(name) == ("train[:98%]", "test")
    assert usual_for(name, {"cifar10": 1}, 0) == 1
    assert usual_for(name, {"cifar100": 1}, 0) == 0


@pytest.mark.parametrize(
    "name",
    ["oxford_flowers102", "oxford_flowers102:2.1.1", "OxfordFlowers102:2.*.*"],
)
def test_spelling_does_not_change_the_number_of_steps(name):
    from configs import common

    config = common.get_finetune_config("Mixer-B_16", None, name)
    assert config.total_steps == 500
    assert config.dataset == name


def test_a_folder_is_not_taken_for_the_dataset_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    touch_folder(tmp_path / "cifar10", {"train/a": 1, "train/b": 1})
    assert default_splits("cifar10") == ("train", "test")
    assert list(open_dataset("cifar10").class_names) == ["a", "b"]


def test_usual_splits():
    assert default_splits("cifar100") == ("train[:98%]", "test")
    assert default_splits("cifar10:3.0.2") == ("train[:98%]", "test")
    assert default_splits("imagenet2012") == ("train[:99%]", "validation")
    assert default_splits("/my/folder") == ("train", "test")


def test_first_of_each_class(tmp_path):
    root = write_folder(tmp_path, {"train/a": 5, "train/b": 2, "train/c": 4})
    source = open_dataset(str(root)).split("train")
    few = first_of_each_class(source, 3, 3)
    assert labels(few) == [0, 0, 0, 1, 1, 2, 2, 2]
    assert few[0].name == source[0].name


def test_first_of_each_class_wants_one_label(tfds_dir):
    dataset = open_dataset("tiny_shapes", data_dir=tfds_dir, label_key="real_label")
    with pytest.raises(DatasetError, match=r"example \d+ has the labels .*one label"):
        first_of_each_class(dataset.split("train"), 2, 1)


def test_labels_of_an_example():
    labels = [Example(b"", label, "").labels for label in (0, 3, -1, (), (2, 0))]
    assert labels == [(0,), (3,), (), (), (2, 0)]


def test_photographs_of_users_are_turned_upright_and_stored_ones_are_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image = Image.fromarray(photographs()[0])
    for split in ("train", "test"):
        path = tmp_path / split / "a" / "0.jpg"
        path.parent.mkdir(parents=True)
        image.save(path, exif=exif)
    example = open_dataset(str(tmp_path)).split("train")[0]
    assert example.pixels().shape == (640, 427, 3)
    stored = example._replace(image=path.read_bytes())
    assert stored.pixels().shape == (427, 640, 3)


def test_label_key_is_refused_where_there_are_no_features(tmp_path):
    (tmp_path / "photos.csv").write_text("path,label\na.png,x\n")
    (tmp_path / "a.png").touch()
    (tmp_path / "photos").mkdir()
    for name in ("digits", str(tmp_path / "photos"), str(tmp_path / "photos.csv")):
        message = f"{name}: found label_key 'real_label'. Expected none.*Leave out"
        with pytest.raises(DatasetError, match=message):
            open_dataset(name, label_key="real_label")
