"""The command, with measurements as short as they can be."""

import json
import math
import pathlib
import sys

import pytest

from mixer_jax.benchmark import images, input, matmul, parts, timing
from mixer_jax.benchmark.start import STAGES, _imports, benchmark_start
from mixer_jax.cli import benchmarks, main
from mixer_jax.cli.app import UsageError
from mixer_jax.data.dataset import open_dataset
from mixer_jax.run.config import ConfigError

from ..run.test_trainer import tiny_config

CONFIG = "configs/digits.py:smoke"


@pytest.fixture
def short(monkeypatch):
    monkeypatch.setattr(matmul, "SIZES", {"cpu": (32, 64)})
    monkeypatch.setattr(timing.take_turns, "__defaults__", (0.0,))
    for name, value in {"LEAST_SECS": 0, "LEAST_STEPS": 2, "EVAL_BATCHES": 1}.items():
        monkeypatch.setattr(input, name, value)
    monkeypatch.setattr(parts, "IMAGES", 4)


@pytest.mark.slow
def test_all_parts_but_the_start_in_one_file(short, tmp_path, capsys):
    output = tmp_path / "found.json"
    benchmarks.benchmark(
        CONFIG,
        ("config.model.num_blocks=1", "config.mixup_p=0.0"),
        parts=("step", "input", "wait", "save", "predict"),
        output=output,
        num_classes=10,
        sources=("config", "jpeg"),
        predict_batches=(1, 3),
        folder=tmp_path,
    )
    report = json.loads(output.read_text())
    assert {"jax", "jaxlib", "numpy", "Python", "grain"} <= report["versions"].keys()
    assert report["machine"]["devices"] == 8
    rows = report["parts"]
    assert [x["step"] for x in rows["step"]] == ["forward", "train"]
    kinds = [(x["source"], x["pipeline"]) for x in rows["input"]]
    assert kinds == [
        (source, kind)
        for source in ("config", "jpeg")
        for kind in ("training", "evaluation")
    ]
    assert [x["source"] for x in rows["wait"]] == ["config", "jpeg"]
    assert [x["batch"] for x in rows["predict"]] == [1, 3]
    figures = [x for found in rows.values() for row in found for x in row.values()]
    spreads = [x for x in figures if isinstance(x, dict)]
    assert len(spreads) == 2 * 3 + 4 * 3 + 2 * 2 + 3 + 2 * 2
    for x in spreads:
        assert x["count"] == 5
        assert 0 <= x["least"] <= x["median"] <= x["most"] < math.inf
    shares = [row["share waiting"] for row in rows["wait"]]
    shares += [row["share of a save"] for row in rows["save"]]
    assert all(share["most"] <= 1 for share in shares)
    printed = capsys.readouterr().out
    for name in (*rows, "versions", "machine", str(output)):
        assert f"\n{name}" in printed
    assert [*tmp_path.iterdir()] == [output]  # no image or checkpoint stays


@pytest.mark.slow
def test_a_start_is_split_into_stages():
    rows, packages = benchmark_start(tiny_config(), 1)
    assert [row["cache"] for row in rows] == ["cold", "warm"]
    for row in rows:
        assert min(row[name].median for name in STAGES) > 0
        total = sum(row[name].median for name in STAGES)
        assert row["total secs"].median == pytest.approx(total)
        assert row["cpu secs"].median > 0
    assert {"jax", "mixer_jax"} <= {row["package"] for row in packages}


def test_imports_are_added_up_by_package():
    lines = [
        "import time: self [us] | cumulative | imported package",
        "import time:       100 |        100 |   jax._src.core",
        "import time:        50 |        150 | jax",
        "import time:         7 |          7 | numpy",
        "WARNING: something else",
    ]
    assert _imports(lines) == pytest.approx({"jax": 150e-6, "numpy": 7e-6})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"repeats": 4}, "--repeats is 4; 5 is the least"),
        ({"parts": ()}, "--parts is empty; expected one or more of start, step"),
        ({"variants": ("B/17",)}, "No Mixer variant is called 'B/17'"),
        ({"batches": (12,)}, "batch is 12; with 8 devices"),
        ({"overrides": ("config.batch=0",)}, "batch is 0; expected"),
        ({"num_classes": 0}, "--num-classes is 0; 1 is the least"),
        ({"predict_batches": (1, 0)}, "--predict-batches is 0; 1 is the least"),
        ({"folder": pathlib.Path("not/there")}, "--folder is not/there, which is no"),
        # Before the many processes of the start.
        ({"parts": ("start", "step"), "sizes": (18,)}, "cannot be cut into patches"),
    ],
)
def test_wrong_flags(flags, message, tmp_path):
    output = tmp_path / "found.json"
    with pytest.raises(UsageError, match=message):
        benchmarks.benchmark(CONFIG, output=output, **{"parts": ("step",)} | flags)
    assert not output.exists()


@pytest.mark.parametrize("config", [["--config", CONFIG], [f"--config={CONFIG}"]])
def test_a_flag_of_several_values_may_stand_before_values_of_the_config(
    config, monkeypatch
):
    argv = ["mixer-jax", "benchmark", *config, "--batches", "8", "--config.batch=z"]
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit, match="batch is 'z'; expected a whole number"):
        main()


def test_the_flags_of_the_command_are_the_parts_there_are():
    assert benchmarks.Part.__args__ == parts.PARTS
    assert benchmarks.Source.__args__ == parts.SOURCES
    with pytest.raises(ConfigError, match="--sources is nowhere; expected"):
        next(parts.benchmark(tiny_config(), sources=["nowhere"]))


def test_made_up_photographs_are_a_dataset(tmp_path):
    paths = images.write_images(tmp_path, 4)
    dataset = open_dataset(str(tmp_path))
    assert {len(dataset.split(name)) for name in ("train", "test")} == {4}
    pixels = [dataset.split("test")[i].pixels() for i in range(4)]
    assert {x.shape for x in pixels} == {(375, 500, 3)}
    sizes = [path.stat().st_size for path in paths]
    assert all(60_000 < size < 200_000 for size in sizes)  # as photographs
    assert len(set(sizes)) == 4
