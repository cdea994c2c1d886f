"""Imports point one way: from examples to batches to steps to files."""

import ast
import pathlib

import pytest

import mixer_jax

PACKAGE = pathlib.Path(__file__).parents[1] / "mixer_jax"

# Each part of the package, a folder or a module beside them, may import those of the
# rows above its own.
LAYERS = [
    {"variants", "blocks", "files", "hlo", "json_files", "data"},
    {"model"},
    {"weights", "training"},
    {"evaluation"},
    {"run"},
    {"plan", "visualize", "benchmark"},
    {"plan_search"},
    {"cli", "__init__"},
]
# Parts whose modules may see a config.
CONFIG = {"run", "cli"}


def part(module: str) -> str:
    """Names the part of a module such as mixer_jax.training.step."""
    pieces = module.removesuffix(".__init__").split(".")[1:]
    return pieces[0] if pieces else "__init__"


def rank(part: str) -> int:
    (rank,) = (i for i, parts in enumerate(LAYERS) if part in parts)
    return rank


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
    own = part(module)
    for name in imports(MODULES[module]):
        if name.split(".")[0] == "mixer_jax" and part(name) != own:
            assert rank(part(name)) < rank(own), f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) == "data"])
def test_data_knows_no_jax(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    assert not roots & {"jax", "flax", "optax"}


@pytest.mark.parametrize("module", [m for m in MODULES if part(m) not in CONFIG])
def test_only_runs_and_programs_see_configs(module):
    roots = {name.split(".")[0] for name in imports(MODULES[module])}
    assert "ml_collections" not in roots


def test_names_of_the_package_are_those_that_type_checkers_know():
    found = imports(PACKAGE / "__init__.py")
    known = {name for name in found if name.startswith("mixer_jax.")}
    assert known == {f"{module}.{name}" for name, module in mixer_jax._MODULES.items()}
    for name in mixer_jax.__all__:
        assert name in dir(mixer_jax)
        assert getattr(mixer_jax, name) is not None
    assert not hasattr(mixer_jax, "no_such_name")
