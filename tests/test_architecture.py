# SPDX-License-Identifier: Apache-2.0

"""Imports within the package run one way."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import anomalib_stfpm_ext

PACKAGE = Path(anomalib_stfpm_ext.__file__).parent


def imported_modules(file: Path) -> set[str]:
    """Return the package's modules that a module imports, within functions too, by their paths in the package."""
    here = file.relative_to(PACKAGE).parts
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = PACKAGE.joinpath(*here[: len(here) - node.level], *(node.module or "").split("."))
            names = [folder / alias.name for alias in node.names]
            found |= {path.with_suffix(".py") for path in [folder, *names]}
    return {path.relative_to(PACKAGE).as_posix() for path in found if path.is_file()}


def test_no_module_imports_itself_on_a_detour():
    files = [file for file in PACKAGE.rglob("*.py") if file != PACKAGE / "__init__.py"]  # which imports on first use
    graph = {file.relative_to(PACKAGE).as_posix(): imported_modules(file) for file in files}
    assert graph["scorer.py"] >= {"ops/anomaly_map.py", "ops/arguments.py", "ops/native.py"}  # the imports are found
    list(TopologicalSorter(graph).static_order())  # raises CycleError


@pytest.mark.parametrize("module", ["_compat", "ops", "errors", "weights", "inference"])
def test_foundations_know_no_model(module):
    files = (PACKAGE / module).glob("*.py") if (PACKAGE / module).is_dir() else [PACKAGE / f"{module}.py"]
    allowed = ("_compat.py", "ops/", "errors.py", "weights.py", "inference/")
    for file in files:
        assert all(name.startswith(allowed) for name in imported_modules(file)), file


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
    assert {"_C", "_data_source", "_version", "_pytree"} <= foreign.pop("_compat.py")  # they are found
    assert {name: names for name, names in foreign.items() if names} == {}


def test_one_module_calls_the_compiled_one():
    files = [file for file in PACKAGE.rglob("*.py") if "_core" in file.read_text(encoding="utf-8")]
    assert [file.relative_to(PACKAGE).as_posix() for file in files] == ["ops/native.py"]
