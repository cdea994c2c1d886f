"""Runs in a notebook's kernel: one process, an event loop, absl's flags not parsed."""

import copy
import pathlib
import re
import shutil

import nbclient
import nbformat
import pytest

from configs import b16, digits
from mixer_jax.run.config import check_config
from mixer_jax.variants import count_patches

from .run.test_trainer import rows
from .test_docs import missing_lines

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def execute(monkeypatch):
    """Runs a notebook from a folder, in a kernel of its own; its cells get outputs."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")

    def run(notebook, folder, secs):
        nbclient.NotebookClient(
            notebook,
            timeout=secs,
            kernel_name="python3",
            resources={"metadata": {"path": str(folder)}},
        ).execute()
        return notebook

    return run


def printed(cell) -> str:
    return "".join(x["text"] for x in cell["outputs"] if x["output_type"] == "stream")


def test_several_runs_in_a_kernel(execute, tmp_path):
    """One after the other, continued, interrupted, and in a thread of its own."""
    cells = [
        f"import sys; sys.path.insert(0, {str(ROOT)!r})",
        """
import asyncio, logging, os, signal, threading
from tests.run.test_trainer import tiny_config, trainer

def run(workdir, **overrides):
    return trainer.train_and_evaluate(tiny_config(**overrides), workdir)

async def is_loop_running():
    return asyncio.get_running_loop().is_running()

assert await is_loop_running()
def handlers():
    return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

before = handlers()
first = run("a")
assert handlers() == before
""",
        'assert run("b") == first',
        'assert run("a") == first',
        """
log = logging.getLogger("mixer_jax")

class Interrupt(logging.Handler):
    def emit(self, record):
        if " 5/12 " in record.getMessage():
            os.kill(os.getpid(), signal.SIGINT)  # what the button "interrupt" sends

log.addHandler(Interrupt())
try:
    run("c")
except trainer.RunStopped as error:
    print(error)
log.handlers.clear()
assert run("c") == first
""",
        'assert await asyncio.to_thread(run, "d") == first',
        "assert not log.handlers and log.propagate",
    ]
    cells = [nbformat.v4.new_code_cell(source) for source in cells]
    notebook = nbformat.v4.new_notebook(cells=cells)
    execute(notebook, tmp_path, secs=300)
    assert "step 12/12" in printed(notebook.cells[1])
    assert "This run is finished" in printed(notebook.cells[3])
    assert "Stopped at step" in printed(notebook.cells[4])
    assert "start    from the checkpoint of step" in printed(notebook.cells[4])
    finals = [(tmp_path / x / "final.npz").read_bytes() for x in "abcd"]
    assert finals[1:] == finals[:1] * 3


def count_pictures(cell) -> int:
    return sum("image/png" in x.get("data", {}) for x in cell["outputs"])


TUTORIAL = ROOT / "notebooks" / "tutorial.ipynb"


@pytest.fixture
def tutorial():
    return nbformat.read(TUTORIAL, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_tutorial_is_small_and_has_the_outputs_of_one_run(tutorial):
    nbformat.validate(tutorial)
    assert TUTORIAL.stat().st_size < 400_000
    cells = code_cells(tutorial)
    numbers = [cell.execution_count for cell in cells]
    assert numbers == list(range(1, len(cells) + 1))
    silent = [i for i, cell in enumerate(cells) if not cell.outputs]
    assert silent == [0, 2]  # what is for Colab only, and the definition of a config
    kinds = {x.output_type for cell in cells for x in cell.outputs}
    assert kinds == {"stream", "display_data", "execute_result"}  # no error
    assert all(x.get("name") != "stderr" for cell in cells for x in cell.outputs)


def test_the_tutorials_configs_are_valid_also_on_colab(tutorial):
    cells = code_cells(tutorial)
    assert cells[0].source.startswith("COLAB = False  #")
    for colab in (False, True):
        names = {"COLAB": colab, "b16": b16, "digits": digits}
        exec(cells[2].source, names)
        for size in ("SMALL", "LARGER", "DOUBLE"):
            config = names["make_config"](names[size], 100, seed=3)
            check_config(config)
            assert (config.seed, config.total_steps) == (3, 100)
            count_patches((names[size], names[size]), config.model.patches.size)
        assert names["DOUBLE"] == 2 * names["SMALL"]
        assert bool(config.pretrained_dir) == colab


@pytest.mark.slow
def test_the_tutorial_prints_what_it_shows(execute, tutorial, tmp_path, monkeypatch):
    """Executed in a copy of the repository; numbers are compared as in test_docs.py."""
    monkeypatch.setenv("XLA_FLAGS", "")  # fast programs, as users have
    for name in ("configs", "mixer_jax", "notebooks"):
        shutil.copytree(ROOT / name, tmp_path / name)
    shown = copy.deepcopy(tutorial)
    execute(tutorial, tmp_path / "notebooks", secs=900)
    for before, cell in zip(code_cells(shown), code_cells(tutorial), strict=True):
        text = re.sub(r"/\S*(?=/runs/)", "…", printed(before))  # folders
        assert not missing_lines(text, printed(cell)), printed(cell)
        assert count_pictures(cell) == count_pictures(before)

    runs = tmp_path / "runs" / "tutorial"
    for size in ("larger", "double"):
        tuned, scratch = (
            [
                x["test/top1"]
                for x in rows(runs / f"{size}, {start}")
                if "test/top1" in x
            ]
            for start in ("fine-tuned", "from scratch")
        )
        assert len(tuned) == len(scratch) == 5
        assert tuned[-1] > scratch[-1] + 0.05
    assert tuned[-1] > 0.9
