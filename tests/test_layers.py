"""Imports point one way: from examples to batches to steps to files."""

import ast
import pathlib

import pytest

PACKAGE = pathlib.Path(__file__).parents[1] / "mixer_jax"

# What each part of the package may import of the others. `training` here is all of it
# but the trainer, which composes everything that a run needs.
ALLOWED = {
    "variants": set(),
    "model": {"variants"},
    "data": set(),
    "weights": {"data", "model", "variants"},
    "training": {"data", "model"},
    "evaluation": {"data", "model", "training", "weights"},
    "trainer": {"data", "model", "training", "evaluation", "weights"},
    "compiled": set(),
    "plan": {"compiled", "data", "model", "variants", "training", "trainer"},
    "visualize": {"data", "model", "training", "evaluation", "weights"},
    "cli": {"*"},
    "__init__": {"*"},
}


def part(module: str) -> str:
    """Names the part of a module such as mixer_jax.training.step."""
    pieces = module.split(".")[1:]
    if pieces in (["training", "setup"], ["training", "trainer"]):
        return "trainer"
    return pieces[0] if pieces else "__init__"


def imports(path: pathlib.Path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


MODULES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module):
    own = part(module.removesuffix(".__init__"))
    allowed = ALLOWED[own] | {own}
    for name in imports(MODULES[module]):
        if name.split(".")[0] != "mixer_jax" or "*" in allowed:
            continue
        known = [m for m in MODULES if name == m or name.startswith(m + ".")]
        target = part(max(known, key=len)) if known else part(name)
        assert target in allowed, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "data"])
def test_data_knows_no_jax(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not roots & {"jax", "flax", "optax"}


def test_only_the_trainer_and_the_programs_see_configs():
    seen = {
        module
        for module, path in MODULES.items()
        if "ml_collections" in {name.split(".")[0] for name in imports(path)}
    }
    assert {part(module) for module in seen} <= {"trainer", "plan", "cli"}
