"""README.md and docs/ are true: their links, names and commands.

The slow test runs the sh and python blocks of all pages in order, in a copy of the
repository. A comment above a block can change that; readers do not see it:

    <!-- not run: the reason -->         the block is not run
    <!-- needs: jax2onnx, … -->          run only if these modules are installed
    <!-- run with: --config.key=… -->    flags added to each train.py, to make it short
    <!-- exit status: 1 -->              what the block ends with, if not with 0

A block without language that follows at once is the output. Each of its lines must be
printed. "…" stands for anything. Of numbers, times and speeds are not compared,
percentages may differ by 3, sizes in bytes and numbers with a decimal point by 10 %.
"""

import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import tomllib

import cv2
import pytest

from configs import common
from mixer_jax.data.dataset import open_dataset

from .examples import write_folder

ROOT = pathlib.Path(__file__).parents[1]
# In the order in which their commands run: README.md trains what the others use.
PAGES = ["README.md", *sorted(f"docs/{x.name}" for x in (ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, "CONTRIBUTING.md"]
MARKS = {"not run", "needs", "run with", "exit status"}
BLOCK_SECS = 300  # a block takes less than a minute on a machine that is not busy

_BLOCK = re.compile(
    r"(?P<marks>(?:^<!-- [^\n]* -->\n)*)"
    r"^```(?P<language>\w*)\n(?P<code>.*?)^```$"
    r"(?:\n\n```\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page, with the comments above it and the output below."""

    where: str
    language: str
    code: str
    output: str
    marks: dict[str, str]


def read_text(page: str) -> str:
    return (ROOT / page).read_text("utf-8")


def read_blocks(page: str) -> list[Block]:
    text = read_text(page)
    return [
        Block(
            f"{page}, line {text.count(chr(10), 0, match.start('code'))}",
            match["language"],
            match["code"],
            match["output"] or "",
            dict(re.findall(r"<!-- ([\w ]+): (.+) -->", match["marks"])),
        )
        for match in _BLOCK.finditer(text)
    ]


BLOCKS = [block for page in PAGES for block in read_blocks(page)]


def without_blocks(page: str) -> str:
    return _BLOCK.sub("", read_text(page))


def anchors(page: pathlib.Path) -> set[str]:
    """The anchors that GitHub gives to a page's headings."""
    text = _BLOCK.sub("", page.read_text("utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", x.lower()).replace(" ", "-") for x in headings}


def links(page: str) -> list[str]:
    return [
        link
        for link in re.findall(r"\]\(([^)]+)\)", without_blocks(page))
        if not link.startswith("https://")
    ]


@pytest.mark.parametrize("page", LINKED)
def test_links_lead_somewhere(page):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), f"{page} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page} links to {link}"


def test_readme_is_short_and_leads_to_every_page():
    assert len(read_text("README.md").splitlines()) <= 260
    assert set(PAGES[1:]) <= set(links("README.md"))


def test_the_tree_in_the_readme_names_what_is_there():
    (tree,) = (x.code for x in BLOCKS if "  model.py " in x.code)
    folder = ROOT
    for line in tree.splitlines():
        name = line.split()[0]
        parent = folder if line.startswith(" ") else ROOT
        assert (parent / name).exists(), line
        if name.endswith("/") and parent == ROOT:
            folder = ROOT / name


@pytest.mark.parametrize("page", LINKED)
def test_named_files_exist(page):
    text = read_text(page)
    files = re.findall(
        r"\b(?:mixer_jax|configs|tests|docs|benchmarks)/[\w/]*\.\w+", text
    )
    missing = [x for x in files if not (ROOT / x).exists()]
    assert not missing


@pytest.mark.parametrize("page", LINKED)
def test_named_keys_and_extras_exist(page):
    text = read_text(page)
    config = common.get_config()
    for key in re.findall(r"--config\.(\w+(?:\.\w+)*)", text):
        *path, last = key.split(".")
        node = config
        for name in path:
            node = node[name]
        # Or a field that the page itself adds to the model.
        is_added = path == ["model"] and f"\n+    {last}: " in text
        assert last in node or is_added, f"{page}: --config.{key}"
    known = tomllib.loads(read_text("pyproject.toml"))["project"]
    extras = {
        x for found in re.findall(r'"\.\[([\w,]+)\]"', text) for x in found.split(",")
    }
    assert extras <= set(known["optional-dependencies"])


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_found(page):
    fences = re.findall(r"^\s*```", read_text(page), re.MULTILINE)
    blocks = read_blocks(page)
    assert len(fences) == 2 * sum(1 + bool(block.output) for block in blocks)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.where)
def test_blocks_are_written_so_that_they_are_run(block):
    assert set(block.marks) <= MARKS
    if block.language not in ("sh", "python"):
        command = re.search(
            r"^\$? ?(pip|python|mixer-jax) .*", block.code, re.MULTILINE
        )
        assert not command, f"{block.where}: {command[0]} is not in a sh block"


# A number, and what follows it if that says how to compare it.
_NUMBER = re.compile(
    r"(?<![\w.])([\d:]+(?= left)|\d[\d,]*(?:\.\d+)?(?:e[-+]\d+)?)"
    r"( images/s| left| s\b| bytes|%)?"
)


def close(shown: re.Match[str], printed: re.Match[str]) -> bool:
    """Compares two numbers as the head of this file says."""
    unit = shown[2] or ""
    if unit != (printed[2] or ""):
        return False
    if unit in (" images/s", " left", " s"):
        return True
    a, b = (float(x[1].replace(",", "")) for x in (shown, printed))
    if unit == "%":
        return abs(a - b) <= 3
    if unit == " bytes" or "." in shown[1]:
        return abs(a - b) <= 0.1 * abs(a)
    return a == b


def same_line(shown: str, printed: str) -> bool:
    shown, printed = (" ".join(x.split()) for x in (shown, printed))
    words = (re.escape(x).replace("…", ".*") for x in _NUMBER.split(shown)[::3])
    if not re.fullmatch(_NUMBER.pattern.join(words), printed):
        return False
    numbers = [list(_NUMBER.finditer(x)) for x in (shown, printed)]
    if "…" in shown:  # which may stand for numbers too
        numbers = [x[: len(numbers[0])] for x in numbers]
    return len(numbers[0]) == len(numbers[1]) and all(map(close, *numbers))


def missing_lines(shown: str, printed: str) -> list[str]:
    return [
        line
        for line in filter(None, map(str.strip, shown.splitlines()))
        if not any(same_line(line, x) for x in printed.splitlines())
    ]


@pytest.mark.parametrize(
    ("printed", "same"),
    [
        ("step 100/1200  top-1 98.63%, loss 0.740, 10 images/s  01:00 left", True),
        ("step 100/1200   top-1 96.70%, loss 0.700, 9,999 images/s  1:00 left", True),
        ("step 100/1200  top-1 90.00%, loss 0.740, 10 images/s  01:00 left", False),
        ("step 100/1200  top-1 98.63%, loss 0.900, 10 images/s  01:00 left", False),
        ("step 101/1200  top-1 98.63%, loss 0.740, 10 images/s  01:00 left", False),
        ("step 100/1200  top-5 98.63%, loss 0.740, 10 images/s  01:00 left", False),
        ("step 100/1200  top-1 98.63%, loss 0.740, 10 images/s", False),
    ],
)
def test_output_is_compared_as_said(printed, same):
    shown = "step  100/1200  top-1 98.63%, loss 0.7414, 912 images/s  01:17 left"
    assert same_line(shown, printed) == same
    assert missing_lines(f"…\n{shown}\n", f"first\n{printed}\nlast") == (
        [] if same else [shown]
    )


@pytest.fixture
def checkout(tmp_path):
    """A copy of the repository, with what the pages take for granted."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    checkout = tmp_path / "repository"
    for name in listed:
        if (ROOT / name).is_file():
            (checkout / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, checkout / name)

    programs = {
        "python": 'if [ "$1" = train.py ]; then set -- "$@" $TRAIN_FLAGS; fi\n'
        f'exec {sys.executable} "$@"',
        "mixer-jax": f"exec {sys.executable} -c "
        '"from mixer_jax.cli import main; main()" "$@"',
        "pip": ":",  # everything is installed
    }
    for name, script in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)

    photos = {f"{x}/{y}": 8 for x in ("train", "test") for y in ("cat", "dog")}
    write_folder(checkout / "my_photos", photos)
    write_folder(checkout / "other_photos", photos)
    digits = open_dataset("digits").split("test")
    scans = checkout / "scans"
    scans.mkdir()
    for i in (3, 50, 177, 300):
        path = scans / f"{digits[i].label}_{i}.png"
        assert cv2.imwrite(str(path), digits[i].image)
    (scans / "broken.png").write_text("x")
    return checkout


def run_block(block: Block, checkout: pathlib.Path) -> tuple[int, str]:
    """Runs a block in the copy. Returns its exit status and all that it printed."""
    program = ["bash", "-e", "-c"] if block.language == "sh" else ["python", "-c"]
    env = os.environ | {
        "PATH": f"{checkout.parent / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(checkout),
        "JAX_PLATFORMS": "cpu",
        "MIXER_JAX_CACHE": str(checkout.parent / "cache"),
        "TRAIN_FLAGS": block.marks.get("run with", ""),
        "GIT_CEILING_DIRECTORIES": str(checkout.parent),  # for git apply
        "XLA_FLAGS": "",  # fast programs, as users have; the numbers shown are theirs
    }
    env.pop("JAX_NUM_CPU_DEVICES", None)
    printed = checkout.parent / "printed.txt"
    with printed.open("w") as file:
        process = subprocess.Popen(
            [*program, block.code],
            cwd=checkout,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            status = process.wait(BLOCK_SECS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            status = -signal.SIGKILL
    return status, printed.read_text("utf-8")


@pytest.mark.slow
def test_commands_do_what_the_pages_say(checkout):
    not_installed = []
    for block in BLOCKS:
        if block.language not in ("sh", "python") or "not run" in block.marks:
            continue
        needed = filter(None, block.marks.get("needs", "").split(", "))
        if not all(map(importlib.util.find_spec, needed)):
            not_installed.append(block.where)
            continue
        status, printed = run_block(block, checkout)
        message = f"{block.where}:\n{block.code}\nprinted\n{printed}"
        assert status == int(block.marks.get("exit status", 0)), message
        missing = missing_lines(block.output, printed)
        assert not missing, f"{message}\nand not\n" + "\n".join(missing)
    if not_installed:
        pytest.skip(f"the rest passed; not installed: what {not_installed} need")
