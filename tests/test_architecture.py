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


@pytest.mark.parametrize("module", ["ops", "errors", "weights", "acceleration"])
def test_foundations_know_no_model(module):
    files = (PACKAGE / module).glob("*.py") if (PACKAGE / module).is_dir() else [PACKAGE / f"{module}.py"]
    allowed = ("ops/", "errors.py", "weights.py", "acceleration/")
    for file in files:
        assert all(name.startswith(allowed) for name in imported_modules(file)), file
