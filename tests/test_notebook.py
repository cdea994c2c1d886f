"""Runs in a notebook's kernel: one process, an event loop, absl's flags not parsed."""

import pathlib

import nbclient
import nbformat
import pytest

ROOT = pathlib.Path(__file__).parents[1]


@pytest.fixture
def execute(monkeypatch, tmp_path):
    """Runs a notebook from a folder, in a kernel of its own; its cells get outputs."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # Runs of the same shapes compile once.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")

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
