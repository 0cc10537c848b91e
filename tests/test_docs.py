# SPDX-License-Identifier: Apache-2.0

"""README and docs: links lead somewhere, commands are understood, and what is named exists."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest

from anomalib_stfpm_ext import StfpmExt
from anomalib_stfpm_ext.cli.parser import make_parser

ROOT = Path(__file__).parents[1]
PAGES = {page.relative_to(ROOT).as_posix(): page for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"))}
PRESENT = [page for page in PAGES if page != "CHANGELOG.md"]  # pages of what is, not of what was


def blocks(page: str, language: str = r"\w+") -> list[str]:
    """Return the code blocks of a language, or of all."""
    text = PAGES[page].read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """Return what links may name in a page, as GitHub makes it of the headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_readme_is_short_and_shows_a_heat_map_soon():
    lines = PAGES["README.md"].read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 150
    assert any(line.startswith("![Heat maps") for line in lines[:20])
    assert any("visualize(" in block for block in blocks("README.md")[:3])


def test_readme_begins_with_two_commands():
    commands = [line.partition("#")[0].strip() for line in blocks("README.md")[0].splitlines()]
    assert commands == ["make demo", "make test"]


def test_readme_leads_to_every_page():
    readme = PAGES["README.md"].read_text(encoding="utf-8")
    assert [page for page in PAGES if page != "README.md" and f"]({page})" not in readme] == []


def test_training_is_a_guide_of_two_pages():
    assert len(PAGES["docs/training.md"].read_text(encoding="utf-8").splitlines()) <= 112


@pytest.mark.parametrize("page", PRESENT)
def test_targets_of_make_exist(page):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    inline = re.findall(r"`(make [^`]*)`", PAGES[page].read_text(encoding="utf-8"))
    for target in re.findall(r"(?:^|&& )make ([a-z][\w-]*)", "\n".join([*blocks(page), *inline]), re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("page", PRESENT)
def test_arguments_of_the_model_exist(page):
    named = re.findall(r"--model\.(?!help)(\w+)", PAGES[page].read_text(encoding="utf-8"))
    assert set(named) <= set(inspect.signature(StfpmExt).parameters)


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page].read_text(encoding="utf-8")):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = (PAGES[page].parent / path) if path else PAGES[page]
            assert linked.exists(), target
            assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES)
def test_python_is_python(page):
    for block in blocks(page, "python"):
        ast.parse(block)


def commands() -> list[str]:
    """Return every command line of stfpm-ext in a page's code blocks."""
    scripts = [block.replace("\\\n", " ") for page in PAGES for block in blocks(page, "bash")]
    lines = [line for script in scripts for line in script.splitlines()]
    return [line for line in lines if line.startswith("stfpm-ext ") and "--print_shtab" not in line]


@pytest.mark.parametrize("line", commands())
def test_commands_are_understood(line):
    make_parser().parse_args(shlex.split(line, comments=True)[1:])


def test_every_command_is_documented():
    documented = {tuple(word for word in shlex.split(line)[1:3] if word[0] not in "-#") for line in commands()}
    wanted = {("info",), ("watch",), ("reproduce",), ("draw", "levels"), ("draw", "histogram")}
    wanted |= {("convert", task) for task in ("from-authors", "from-anomalib", "to-authors")}
    assert documented == wanted


def test_every_test_that_the_page_of_features_names_exists():
    rows = [line for line in PAGES["docs/features.md"].read_text().splitlines() if line.startswith("| ")][1:]
    assert len(rows) > 20
    for row in rows:
        named = re.findall(r"`([\w/]*test_\w+\.py)::(test_\w+)`", row.split("|")[3])
        assert named, f"no test: {row}"
        for file, test in named:
            assert f"\ndef {test}(" in (ROOT / "tests" / file).read_text(), f"{file}::{test}"
