import importlib.util
import json
import logging
import os
import pathlib
import re
import shutil
import subprocess
import sys

import cv2
import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

from configs import digits
from mixer_jax import cli
from mixer_jax.data.dataset import open_dataset
from mixer_jax.data.decode import decode
from mixer_jax.data.names import printable
from mixer_jax.data.preprocess import EvalTransform
from mixer_jax.data.walk import find_images
from mixer_jax.run import trainer
from mixer_jax.variants import Patches, Variant
from mixer_jax.weights import layout
from mixer_jax.weights.npz import read_checkpoint, save_checkpoint
from mixer_jax.weights.published import PUBLISHED


@pytest.fixture
def mixer_jax(monkeypatch, capsys):
    """Runs the command and returns its exit status, output and messages."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["mixer-jax", *map(str, args)])
        status = 0
        try:
            cli.main()
        except SystemExit as error:
            status = error.code
        output, messages = capsys.readouterr()
        if isinstance(status, str):  # Python prints it, and exits with 1
            status, messages = 1, messages + status
        return status, output, messages

    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The workdir of a short run on digits, and what its last evaluation gave."""
    config = digits.get_config()
    with config.unlocked():
        config.total_steps = 100
        config.eval_every = config.checkpoint_every = 100
        config.warmup_steps = 10
        config.batch = config.batch_eval = 64
        config.model.num_blocks = 1
        config.mixup_p = 0.0  # half of what the step's compilation would take
    workdir = tmp_path_factory.mktemp("run")
    return workdir, trainer.train_and_evaluate(config, workdir)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """Forty test digits as PNG files, whose names begin with the label."""
    folder = tmp_path_factory.mktemp("pictures")
    test = open_dataset("digits").split("test")
    for i in range(0, len(test), 9):
        cv2.imwrite(str(folder / f"{test[i].label}_{i}.png"), test[i].image)
    return folder


def test_evaluate_gives_the_number_that_the_run_gave(mixer_jax, run, tmp_path):
    workdir, results = run
    assert results["top1"] > 0.5
    status, output, _ = mixer_jax(
        "evaluate",
        workdir,
        "--json-file",
        tmp_path / "a.json",
        "--confusion-matrix",
        tmp_path / "a.png",
    )
    assert status == 0
    assert f"top-1      {results['top1']:.2%}" in output
    assert f"loss       {results['loss']:.4f}" in output
    found = json.loads((tmp_path / "a.json").read_text())
    assert {k: found[k] for k in results} == pytest.approx(results, rel=1e-5)
    hits = sum(x["top1"] * x["count"] for x in found["classes"])
    assert hits == pytest.approx(results["top1"] * results["count"])
    assert decode((tmp_path / "a.png").read_bytes()).shape[2] == 3
    # The same from the file alone, told what the run knew.
    (tmp_path / "names.txt").write_text("\n".join("0123456789"))
    args = ["--dataset", "digits", "--split", "test", "--class-names"]
    status, from_file, _ = mixer_jax(
        "evaluate", workdir / "final.npz", *args, tmp_path / "names.txt"
    )
    assert (status, from_file) == (0, output)


def test_a_run_that_is_going_on_is_read_at_its_newest_checkpoint(
    mixer_jax, run, tmp_path
):
    workdir, _ = run
    live = tmp_path / "live"
    live.mkdir()
    for name in ("checkpoints", "config.json", "class_names.json"):
        (live / name).symlink_to(workdir / name)
    assert mixer_jax("convert", live, tmp_path / "a.npz")[0] == 0
    expected = read_checkpoint(workdir / "final.npz")
    found = read_checkpoint(tmp_path / "a.npz")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_run_whose_files_are_damaged_is_read_where_it_is_whole(
    mixer_jax, run, tmp_path, caplog
):
    workdir, results = run
    copy = shutil.copytree(workdir, tmp_path / "copy")
    final = copy / "final.npz"
    final.write_bytes(final.read_bytes()[:-1000])
    status, output, _ = mixer_jax("evaluate", copy)
    assert (status, len(caplog.messages)) == (0, 1)
    assert f"top-1      {results['top1']:.2%}" in output
    assert f"{final} of" in caplog.text
    assert "The newest whole checkpoint is read instead" in caplog.text

    shutil.copytree(copy / "checkpoints" / "100", copy / "checkpoints" / "150")
    (copy / "checkpoints" / "150" / "default" / "_METADATA").write_text("{}")
    caplog.clear()
    assert mixer_jax("evaluate", copy)[:2] == (0, output)
    assert len(caplog.messages) == 2
    assert "150 is damaged: default/_METADATA has 2 bytes" in caplog.text

    (copy / "checkpoints" / "100" / "default" / "_METADATA").write_text("{}")
    status, _, messages = mixer_jax("evaluate", copy)
    assert status == 1
    assert "DamagedError: All checkpoints in" in messages
    shutil.rmtree(copy / "checkpoints")
    status, _, messages = mixer_jax("evaluate", copy)
    assert status == 1
    assert f"CheckpointError: {final} of" in messages


@pytest.mark.parametrize("ending", ["stablehlo", "onnx"])
def test_exported_file_classifies_as_predict_does(
    mixer_jax, run, pictures, tmp_path, ending
):
    if ending == "onnx" and importlib.util.find_spec("jax2onnx") is None:
        pytest.skip("the extra onnx is not installed")
    workdir, _ = run
    status, output, _ = mixer_jax("predict", workdir, pictures, "--format", "json")
    predictions = json.loads(output)
    assert status == 0
    assert len(predictions) == len(list(pictures.iterdir())) == 41
    hits = [os.path.basename(x["file"])[0] == x["names"][0] for x in predictions]
    assert np.mean(hits) > 0.5

    path = tmp_path / f"digits.{ending}"
    status, output, _ = mixer_jax("export", workdir, path)
    assert status == 0
    assert f"{path}: {path.stat().st_size:,} bytes" in output
    about = json.loads((tmp_path / f"digits.{ending}.json").read_text())
    about["preprocessing"].pop("steps")  # the others are a transform's fields
    transform = EvalTransform(**about["preprocessing"])
    files = [x["file"] for x in predictions]
    images = np.stack([transform(decode(pathlib.Path(x).read_bytes())) for x in files])
    if ending == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        [logits] = session.run(None, {"images": images})
    else:
        logits = jax.export.deserialize(bytearray(path.read_bytes())).call(images)
    for x, scores in zip(predictions, jax.nn.softmax(logits), strict=True):
        order = np.argsort(-scores)[:5]
        assert x["names"] == [about["class_names"][i] for i in order]
        np.testing.assert_allclose(x["probabilities"], scores[order], atol=1e-5)


def test_unreadable_files_are_named_and_the_rest_go_on(
    mixer_jax, run, pictures, tmp_path
):
    (tmp_path / "broken.png").write_bytes(b"no image")
    args = ["predict", run[0], f"{pictures}/7_*.png", tmp_path / "broken.png"]
    status, output, messages = mixer_jax(*args, "--top-k", 2)
    assert status == 1
    assert len(output.splitlines()) == 2 * len(list(pictures.glob("7_*")))
    assert f"{tmp_path}/broken.png: damaged or not an image" in messages
    status, printed, _ = mixer_jax(*args, "--format", "csv", "--output", tmp_path / "o")
    assert (status, printed) == (1, "")
    assert (tmp_path / "o").read_text().startswith("file,rank,class,name,probability\n")


@pytest.fixture(scope="module")
def odd_pictures(tmp_path_factory):
    """Two images of a class, one of them broken, with names that are not in UTF-8."""
    root = os.fsencode(tmp_path_factory.mktemp("odd"))
    for split in (b"train", b"test"):
        for name in (b"caf\xe9", b"dog"):
            folder = os.path.join(root, split, name)
            os.makedirs(folder)
            image = cv2.imencode(".png", np.full((9, 9, 3), len(name), np.uint8))[1]
            for file, content in (b"1\xe9.png", image.tobytes()), (b"x\xe9.png", b"x"):
                pathlib.Path(os.fsdecode(os.path.join(folder, file))).write_bytes(
                    content
                )
    return pathlib.Path(os.fsdecode(root))


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_names_of_files_that_are_not_in_utf8(
    mixer_jax, run, odd_pictures, tmp_path, form
):
    args = ["predict", run[0], odd_pictures / "test", "--format", form]
    odd_output = tmp_path / os.fsdecode(b"o\xe9")
    status, _, messages = mixer_jax(*args, "--output", odd_output)
    assert status == 1
    assert r"caf\xe9/x\xe9.png: damaged or not an image" in messages
    text = odd_output.read_text("utf-8")
    assert r"test/dog/1\xe9.png" in text.replace(r"\\", "\\")
    assert mixer_jax(*args)[1] == text
    if form == "json":  # the name of the file can be had back
        files = [x["file"] for x in json.loads(text)]
        assert files == [
            printable(x) for x in find_images([str(odd_pictures / "test")])
        ]
        for file in files:
            name = re.sub(
                rb"\\x([89a-f][0-9a-f])",
                lambda match: bytes.fromhex(match[1].decode()),
                file.encode(),
            )
            assert os.path.exists(name)


def test_classes_whose_names_are_not_in_utf8(mixer_jax, loaded, odd_pictures, tmp_path):
    (tmp_path / "names.json").write_text(
        r'["caf\\xe9", "dog", "3", "4", "5", "6", "7"]'
    )
    model = tmp_path / os.fsdecode(b"a\xe9.npz")
    save_checkpoint(model, loaded.params)
    odd = lambda name: tmp_path / os.fsdecode(name)
    names = ["--class-names", tmp_path / "names.json"]
    status, output, _ = mixer_jax(
        *("evaluate", model, "--dataset", odd_pictures, *names),
        *("--json-file", odd(b"e\xe9.json")),
        *("--confusion-matrix", odd(b"c\xe9.png")),
    )
    assert status == 0
    assert re.search(r"^caf\\xe9 +\d", output, re.M)
    about = json.loads(odd(b"e\xe9.json").read_text("utf-8"))
    assert about["model"].endswith(r"/a\xe9.npz")
    assert about["classes"][0]["name"] == r"caf\xe9"
    assert odd(b"c\xe9.png").stat().st_size > 1000
    assert mixer_jax("export", model, odd(b"x\xe9.stablehlo"), *names)[0] == 0
    about = json.loads(odd(b"x\xe9.stablehlo.json").read_text("utf-8"))
    assert about["class_names"][0] == r"caf\xe9"


def test_a_console_that_has_ascii_only(run, odd_pictures):
    """Such as that of LANG=C, or of a program that reads the output."""
    code = "from mixer_jax import cli; cli.main()"
    for args in (
        ["predict", run[0], odd_pictures, "--format", "csv"],
        ["data", "check", odd_pictures],
        ["plan", "--help"],
    ):
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code, *args],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONIOENCODING": "ascii", "JAX_PLATFORMS": "cpu"},
        )
        assert "Traceback" not in done.stderr
        assert done.returncode == (args[-1] != "--help")
        assert (r"caf\xe9" in done.stdout) == (args[-1] != "--help")


def test_convert_there_and_back(mixer_jax, run, golden, tmp_path, caplog):
    workdir, _ = run
    for source, target in (
        (workdir, "a.npz"),
        (tmp_path / "a.npz", "b.safetensors"),
        (tmp_path / "b.safetensors", "c.npz"),
    ):
        with caplog.at_level(logging.WARNING, logger="mixer_jax"):
            caplog.clear()
            assert mixer_jax("convert", source, tmp_path / target)[0] == 0
        assert ("and logits slightly" in caplog.text) == (target[0] == "b")
    printed = mixer_jax("convert", workdir, tmp_path / "a.npz")[1]
    beside = tmp_path / "a.npz.json"
    assert f"{beside}: what is known of them. It belongs to a.npz\n" in printed
    first, last = (read_checkpoint(tmp_path / x) for x in ("a.npz", "c.npz"))
    jax.tree.map(np.testing.assert_array_equal, first, last)
    about = [(tmp_path / f"{x}.npz.json").read_text() for x in "ac"]
    assert about[0] == about[1]
    older = golden.path / "older_layout_checkpoint.npz"
    assert mixer_jax("convert", older, tmp_path / "new.npz")[0] == 0
    with np.load(tmp_path / "new.npz") as file:
        assert "stem/kernel" in file
    timm = golden.path / "timm_mixer.safetensors"
    assert mixer_jax("convert", timm, tmp_path / "t.npz")[0] == 0
    assert (
        "\ncomputes    gelu erf, layer" in mixer_jax("inspect", tmp_path / "t.npz")[1]
    )


def test_convert_for_mlp_mixer_pytorch(mixer_jax, golden, tmp_path):
    path = golden.path / "mlp_mixer_pytorch.safetensors"
    target = tmp_path / "a.safetensors"
    status, _, error = mixer_jax("convert", path, target)
    assert status == 1
    assert "24 tokens of 8x8 pixels, which make no square image" in error
    assert "--image-size" in error
    size = ["--image-size", "32x48"]
    to = ["--to", "mlp-mixer-pytorch"]
    assert mixer_jax("convert", path, target, *to, *size)[0] == 0
    found, expected = load_file(target), load_file(path)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert found[name].tobytes() == array.tobytes()
    printed = mixer_jax("inspect", target)[1]  # it knows its size now
    assert "(images of 32x48 pixels, patches of 8x8)" in printed
    assert "computes    gelu erf, layer_norm_epsilon 1e-05" in printed


@pytest.mark.parametrize(
    ("target", "to", "message"),
    [
        ("a.pth", None, "ends in neither .npz nor .safetensors. For a folder: --to hf"),
        ("a.npz", "timm", "--to timm writes a file that ends in .safetensors"),
        ("a.safetensors", "npz", "--to npz writes a file that ends in .npz"),
        ("a.safetensors", "hf", "--to hf writes a folder"),
        ("folder", "mlp-mixer-pytorch", "writes a file that ends in .safetensors"),
    ],
)
def test_convert_to_a_name_of_another_format(mixer_jax, tmp_path, target, to, message):
    options = ["--to", to] if to else []
    status, _, error = mixer_jax("convert", "any", tmp_path / target, *options)
    assert status == 1
    assert message in error
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("resolution", ["block_diagonal", "interpolate"])
def test_a_model_for_another_size_of_images(
    mixer_jax, run, pictures, tmp_path, resolution
):
    """As a file, and on the way."""
    at_32 = ["--image-size", 32, "--resolution", resolution]
    path = tmp_path / "a.npz"
    status, output, _ = mixer_jax("convert", run[0], path, *at_32)
    assert status == 0
    units = {"block_diagonal": " --config.model.tokens_mlp_dim=128", "interpolate": ""}
    assert f"Train from it with --config.pp.crop=32{units[resolution]}.\n" in output
    printed = mixer_jax("inspect", path)[1]
    assert "64 tokens (images of 32x32 pixels, patches of 4x4)" in printed
    (tmp_path / "names.txt").write_text("\n".join("0123456789"))
    args = ["--dataset", "digits", "--split", "test[:100]", "--class-names"]
    args.append(tmp_path / "names.txt")
    status, evaluated, _ = mixer_jax("evaluate", run[0], *args, *at_32)
    assert "transform  resize, to 32x32, bilinear\n" in evaluated
    assert (status, evaluated) == mixer_jax("evaluate", path, *args)[:2]
    args = [f"{pictures}/7_*.png", *args[4:]]
    status, predicted, _ = mixer_jax("predict", run[0], *args, *at_32)
    assert (status, predicted) == mixer_jax("predict", path, *args)[:2]
    assert status == 0


def test_checkpoints(mixer_jax, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXER_JAX_CACHE", str(tmp_path))
    path = tmp_path / "gsam" / "Mixer-S_32.npz"
    path.parent.mkdir()
    path.touch()
    os.truncate(path, PUBLISHED["gsam/Mixer-S_32"].num_bytes)
    (path.parent / "Mixer-S_16.npz").write_bytes(b"cut off")
    status, output, _ = mixer_jax("checkpoints")
    assert status == 0
    rows = {x.split()[0]: x.split()[1:] for x in output.splitlines() if "/Mixer" in x}
    assert rows.keys() == PUBLISHED.keys()
    assert rows["imagenet1k/Mixer-L_16"] == ["L/16", "1000", "833", "71.76", "%", "no"]
    assert rows["gsam/Mixer-S_32"] == ["S/32", "1000", "76", "-", "yes"]
    assert rows["gsam/Mixer-S_16"][-1] == "no"


def test_inspect(mixer_jax, run, monkeypatch, tmp_path):
    monkeypatch.setenv("MIXER_JAX_CACHE", str(tmp_path))  # nothing there, nor fetched
    status, output, _ = mixer_jax("inspect", "imagenet1k/Mixer-B_16")
    assert status == 0
    assert "parameters  59,880,472, 59,111,472 without the head" in output
    assert re.search(r"^stem/kernel +16 x 16 x 3 x 768 +589,824$", output, re.M)
    assert "MixerBlock_1 to MixerBlock_11 are as MixerBlock_0." in output
    status, output, _ = mixer_jax("inspect", run[0])
    assert status == 0
    assert "head        10 classes" in output
    assert re.search(r"^head/bias +10 +10$", output, re.M)


def test_a_file_that_does_not_say_the_size_of_its_images(mixer_jax, golden, tmp_path):
    path = golden.path / "mlp_mixer_pytorch.safetensors"
    status, output, _ = mixer_jax("inspect", path)
    assert status == 0
    assert "24 tokens (images of ?, patches of 8x8)" in output
    assert "computes    gelu erf, layer_norm_epsilon 1e-05" in output
    figure = tmp_path / "a.png"
    draw = ("plot", "weights", path, "--pairs", 2, "--blocks", 0, "--output", figure)
    status, _, messages = mixer_jax(*draw)
    assert status == 1
    assert "as in --image-size 320x224" in messages
    assert mixer_jax(*draw, "--image-size", "32x48")[0] == 0
    assert decode(figure.read_bytes()).shape[2] == 3


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("command", ["predict", "evaluate", "export"])
def test_a_file_for_images_of_other_channels(
    mixer_jax, pictures, tmp_path, channels, command
):
    variant = Variant(Patches((4, 4)), 1, 12, 6, 20)
    shapes = layout.MixerSizes(variant, 16, 10, channels).shapes()
    params = {key: np.zeros(shape, "float32") for key, shape in shapes.items()}
    path = tmp_path / "grey.npz"
    save_checkpoint(path, layout.unflatten(params))
    more = {"predict": pictures, "evaluate": "--dataset=digits"}
    status, _, messages = mixer_jax(command, path, more.get(command, "a.stablehlo"))
    assert status == 1
    assert "for images of 16x16 pixels and 3 channels" in messages
    assert f"stem/kernel: found (4, 4, {channels}, 12), expected (4, 4, 3" in messages
    assert mixer_jax("convert", path, tmp_path / "same.npz")[0] == 0


def test_a_file_for_images_of_other_colors_is_told_once(
    mixer_jax, run, pictures, tmp_path
):
    """convert keeps it, and evaluate, predict and export use it."""
    plain = tmp_path / "plain.npz"
    save_checkpoint(plain, read_checkpoint(run[0] / "final.npz"))
    colors = ("--mean", "0.485,0.456,0.406", "--std", 0.25)
    assert mixer_jax("convert", plain, tmp_path / "a.npz", *colors)[0] == 0

    def predicted(*args):
        status, output, _ = mixer_jax("predict", *args, pictures, "--format", "json")
        assert status == 0
        return json.loads(output)

    assert predicted(tmp_path / "a.npz") == predicted(plain, *colors)
    assert predicted(plain, *colors) != predicted(plain)
    assert mixer_jax("export", plain, tmp_path / "a.stablehlo", *colors)[0] == 0
    about = json.loads((tmp_path / "a.stablehlo.json").read_text())["preprocessing"]
    assert (about["mean"], about["std"]) == ([0.485, 0.456, 0.406], [0.25] * 3)
    for wrong in ("0.1,0.2", "123.7", "nan", "red"):
        found = mixer_jax("predict", plain, pictures, "--mean", wrong)
        assert found[0] == 2
        assert "--mean" in "".join(found[1:])


def test_help(mixer_jax):
    status, output, _ = mixer_jax()
    assert status == 0
    for name in ("evaluate", "predict", "export", "convert", "checkpoints", "inspect"):
        assert name in output
    assert mixer_jax("--help")[1] == output


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("inspect nowhere.npz", "FileNotFoundError: nowhere.npz: no such file"),
        ("inspect {tmp_path}", "CheckpointError: .* is a folder without a config.json"),
        ("evaluate {run} --dataset digit", "DatasetError: There is no dataset 'digit'"),
        ("evaluate {run} --split dev", "DatasetError: digits has no split 'dev'"),
        (
            "evaluate a.npz",
            r"UsageError: .* is not here, so not the workdir of a run. A model of ",
        ),
        (
            "evaluate imagenet1k/Mixer-L_16",
            r"UsageError: .* is not here, so not the workdir of a run. A model of ",
        ),
        ("evaluate {run} --batch 0", "UsageError: --batch is 0"),
        ("predict {run}", "UsageError: Name images"),
        ("predict {run} nowhere", "FileNotFoundError: nowhere: no such file"),
        ("predict {run} {run} --top-k 0", "UsageError: --top-k is 0"),
        (
            "predict {run} {pictures} --evaluation resize_then_central_crop --resize 9",
            "UsageError: --resize is 9x9, but the model sees 16x16 pixels: "
            "resize_then_central_crop needs at least that. Give --resize 16x16, say.",
        ),
        (
            "predict {run} {pictures} --resize 0",
            "UsageError: --resize is 0x0; 1 is the",
        ),
        (
            "evaluate {run} --split dev",
            r"DatasetError: .* --config.pp.test=test, or --split test of mixer-jax eva",
        ),
        (
            "predict {run} {pictures} --image-size 18",
            "CheckpointError: .*18x18 pixels cannot be cut into patches of 4x4",
        ),
        (
            "convert {run} a.npz --image-size 24 --resolution block_diagonal",
            "CheckpointError: .*no block_diagonal from 4x4 patches to 6x6",
        ),
        ("predict {run} {pictures} --std 0.5,0,1", "UsageError: --std is 0, expected"),
        ("convert {run} a.npz --std 0", "UsageError: --std is 0, expected"),
        ("export {run} a.pb", r"UsageError: a.pb ends in neither .stablehlo nor .onnx"),
        ("convert {run} folder", r"UsageError: folder ends in neither .npz nor .safet"),
        ("inspect gs://mixer_models/Mixer-X.npz", "CheckpointError: .* no such publis"),
    ],
)
def test_known_errors_are_one_message(
    mixer_jax, run, pictures, tmp_path, monkeypatch, args, message
):
    monkeypatch.chdir(tmp_path)
    words = args.format(run=run[0], pictures=pictures, tmp_path=tmp_path).split()
    status, output, messages = mixer_jax(*words)
    assert (status, output) == (1, "")
    assert re.match(message, messages), messages
    assert os.listdir(tmp_path) == []


def test_figures_of_a_run(mixer_jax, run, pictures, tmp_path):
    workdir, _ = run
    drawn = tmp_path / "weights.svg"
    status, output, _ = mixer_jax("plot", "weights", workdir, "--output", drawn)
    assert (status, output) == (0, f"{drawn}\n")
    assert "<svg" in drawn.read_text()[:1000]
    image = next(pictures.iterdir())
    drawn = tmp_path / "mixing.png"
    arguments = ("plot", "mixing", workdir, image, "--tokens", 0, 1, 3, 3)
    status, output, messages = mixer_jax(*arguments, "--output", drawn)
    assert (status, output, messages) == (0, f"{drawn}\n", "")
    with_units = drawn.stat().st_size
    assert with_units > 50_000  # the images of the run's test split are in it

    _, _, messages = mixer_jax(*arguments, "--block", 3, "--output", drawn)
    assert "no block of the name MixerBlock_3" in messages
    assert drawn.stat().st_size == with_units


def test_figures_of_a_file(mixer_jax, loaded, pictures, tmp_path, caplog):
    model = tmp_path / "model.npz"
    save_checkpoint(model, loaded.params)
    for file in (*sorted(pictures.iterdir())[:3],):
        shutil.copy(file, tmp_path / file.name)
    (tmp_path / "x.png").write_text("x")
    image = pictures / sorted(pictures.iterdir())[0]
    alone, compared = tmp_path / "alone.svg", tmp_path / "compared.svg"
    assert mixer_jax("plot", "mixing", model, image, "--output", alone)[0] == 0
    images = ("--images", tmp_path, "--units", 2)
    assert (
        mixer_jax("plot", "mixing", model, image, "--output", compared, *images)[0] == 0
    )
    assert "skipping" in caplog.text  # x.png
    assert alone.read_text().count("<image ") == 5 + 1  # and the colour bar
    # The unit and its three images too, and a second colour bar.
    assert compared.read_text().count("<image ") == 6 + 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["weights", "{model}", "--output", "a.pdf"], "a.pdf ends in neither .png nor"),
        (["weights", "{model}", "--pairs", "0"], "--pairs is 0"),
        (["weights", "{model}", "--blocks", "4"], "no MixerBlock_4/token_mixing"),
        (["mixing", "{model}", "no.png"], "no.png: No such file"),
        (
            ["mixing", "{model}", "{image}", "--tokens", "0", "4"],
            "no token in row 0, co",
        ),
        (
            ["mixing", "{model}", "{image}", "--images", "no"],
            "no: no such file, nor a f",
        ),
    ],
)
def test_mistakes_in_figures(
    mixer_jax, loaded, pictures, tmp_path, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    save_checkpoint(tmp_path / "model.npz", loaded.params)
    image = next(pictures.iterdir())
    arguments = [x.format(model="model.npz", image=image) for x in arguments]
    _, _, messages = mixer_jax("plot", *arguments)
    assert message in messages
    assert [x.name for x in tmp_path.iterdir()] == ["model.npz"]


def test_a_confusion_matrix_of_another_kind_is_refused_at_once(mixer_jax):
    arguments = ("evaluate", ".", "--confusion-matrix", "a.jpg")
    assert "a.jpg ends in neither .png nor .svg" in mixer_jax(*arguments)[2]
