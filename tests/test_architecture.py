# SPDX-License-Identifier: Apache-2.0

"""Imports within the package run one way."""

import ast
import inspect
import re
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import anomalib_stfpm_ext
from anomalib_stfpm_ext import StfpmExt

PACKAGE = Path(anomalib_stfpm_ext.__file__).parent


def imports(tree: ast.AST) -> Iterator[ast.ImportFrom]:
    """Iterate over relative imports, within functions too, but for those that only a type checker sees."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.level:
            yield node
        yield from imports(node)


def imported_modules(file: Path) -> set[str]:
    """Return the package's modules that a module imports, by their paths in the package."""
    here = file.relative_to(PACKAGE).parts
    found = set()
    for node in imports(ast.parse(file.read_text(encoding="utf-8"))):
        folder = PACKAGE.joinpath(*here[: len(here) - node.level], *(node.module or "").split("."))
        names = [folder / alias.name for alias in node.names]
        found |= {path.with_suffix(".py") for path in [folder, *names]} | {folder / "__init__.py"}
    return {path.relative_to(PACKAGE).as_posix() for path in found if path.is_file()}


MODULES = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]  # which imports on first use
GRAPH = {file.relative_to(PACKAGE).as_posix(): imported_modules(file) for file in MODULES}


def test_no_module_imports_itself_on_a_detour():
    assert GRAPH["scorer.py"] >= {"ops/anomaly_map.py", "ops/arguments.py", "ops/native.py"}  # the imports are found
    without_rooms = {name: {each for each in found if "__init__" not in each} for name, found in GRAPH.items()}
    list(TopologicalSorter(without_rooms).static_order())  # raises CycleError


def rows() -> list[list[str]]:
    """Return what the first table of docs/architecture.md has in its first column, row by row."""
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text(encoding="utf-8")
    table = page.partition("|---|---|\n")[2].partition("\n\n")[0]
    return [re.findall(r"`([^`]+)`", line.split("|")[1]) for line in table.splitlines()]


def test_imports_run_downwards_as_the_page_says():
    row_of = {name: number for number, names in enumerate(rows()) for name in names}

    def row(module: str) -> int:
        first, _, rest = module.partition("/")
        return row_of[f"{first}/" if rest else first.removesuffix(".py")]

    pairs = {(name, other) for name, found in GRAPH.items() for other in found if other != "__init__.py"}
    upwards = {(name, other) for name, other in pairs if row(other) < row(name)}
    assert upwards == set()
    rooms = {name.partition("/")[0] for name in GRAPH if "/" in name}
    assert {name.rstrip("/") for name in row_of if name.endswith("/")} == rooms


def test_modules_have_names_of_their_own():
    names = [file.stem for file in MODULES if not file.stem.startswith("__")]
    commands = {"command", "convert", "torch", "anomalib", "lightning"}  # of a room each; of a vendor each
    assert {name for name in names if names.count(name) > 1} <= commands


def test_the_model_can_be_read_at_a_sitting():
    assert len((PACKAGE / "lightning_model.py").read_text(encoding="utf-8").splitlines()) <= 300
    assert len(inspect.signature(StfpmExt).parameters) <= 19


def test_callbacks_act_in_this_order():
    """Losses are read, statistics estimated and images held out before a student is measured; see the page."""
    names = [type(callback).__name__ for callback in StfpmExt(teacher_weights=False).configure_callbacks()]
    page = (Path(__file__).parents[1] / "docs/architecture.md").read_text(encoding="utf-8")
    expected = re.findall(r"^\d+\. `(\w+)`", page, re.MULTILINE)
    assert names[-len(expected) :] == expected
    assert len(expected) == len(list((PACKAGE / "callbacks").glob("[a-z]*.py"))) - 1  # fit_resource is their base


def names_of_others(tree: ast.AST, own: set[str]) -> set[str]:
    """Return names with one underscore before them that are used, but not defined in this package."""
    used: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used.update(alias.name for alias in node.names)
            used.update((node.module or "").split("."))
        elif isinstance(node, ast.Import):
            used.update(part for alias in node.names for part in alias.name.split("."))
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in {"getattr", "hasattr", "setattr"}:
            used.update(argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant))
    return {name for name in used if name.startswith("_") and not name.startswith("__")} - own


def own_names(tree: ast.AST) -> set[str]:
    """Return what a module defines: functions, classes, variables, and attributes of ``self``."""
    own = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            own.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            own.add(node.id)
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and getattr(node.value, "id", "") == "self"
        ):
            own.add(node.attr)
    return own


# The methods of named tuples are public, in spite of their names; the others are this project's modules.
PUBLIC = {"_asdict", "_replace", "_anomalib_stfpm_ext_autoload", "_compat", "_core"}


def test_private_names_of_other_packages_are_in_compat_alone():
    trees = {
        file.relative_to(PACKAGE).as_posix(): ast.parse(file.read_text(encoding="utf-8"))
        for file in PACKAGE.rglob("*.py")
    }
    own = PUBLIC.union(*map(own_names, trees.values()))
    foreign = {name: names_of_others(tree, own) for name, tree in trees.items()}
    compat = [foreign.pop(name) for name in list(foreign) if name.startswith("_compat/")]
    assert {"_C", "_data_source", "_version", "_pytree"} <= set().union(*compat)  # they are found
    assert {name: names for name, names in foreign.items() if names} == {}


def test_one_module_calls_the_compiled_one():
    files = [file for file in PACKAGE.rglob("*.py") if "_core" in file.read_text(encoding="utf-8")]
    assert [file.relative_to(PACKAGE).as_posix() for file in files] == ["ops/native.py"]
