"""What the documents say exists: commands, recipes, make targets, links, and the test that holds each promise."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from pipelines.recipes import RECIPES

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
HELD_BY = "held by"
"""Title of the last column of a table of promises."""


def test_the_documents_name_only_commands_and_files_that_exist():
    wrong: list[str] = []
    for path in (*DOCUMENTS, ROOT / "ray_cluster.yaml"):
        text = path.read_text()
        for module in re.findall(r"python -m ((?:pipelines|cluster|benchmarks)\.\w+)", text):
            placeholder = module.rpartition(".")[2].isupper()
            if not placeholder and not (ROOT / Path(*module.split("."))).with_suffix(".py").is_file():
                wrong.append(f"{path.name}: python -m {module}")
        for name in re.findall(r"pipelines\.train ([a-z][\w-]*)", text):
            if name not in RECIPES:
                wrong.append(f"{path.name}: recipe {name}")
        for target in re.findall(r"`make ([\w-]+)", text):
            if not re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE):
                wrong.append(f"{path.name}: make {target}")
        for link in re.findall(r"\]\((?!https?://|#)([^)#]+)", text):
            if not (path.parent / link).exists():
                wrong.append(f"{path.name}: {link}")
    assert wrong == []


@cache
def names_of_tests(path: Path) -> set[str]:
    """Names of the tests in a file; of a file that does not exist, none."""
    if not path.is_file():
        return set()
    return {node.name for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)}


def named(text: str) -> list[str]:
    """The tests that a text names, as `tests/PATH.py` or `tests/PATH.py::NAME`; `PATH.py::NAME` counts from tests/."""
    return re.findall(r"`((?:[\w/]+/)?test_\w+\.py(?:::\w+)?)`", text)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_test_that_a_document_names_exists(document: Path):
    missing: list[str] = []
    for name in named(document.read_text()):
        path, _, test = name.partition("::")
        file = ROOT / path if path.startswith("tests/") else ROOT / "tests" / path
        if not file.is_file() or (test and test not in names_of_tests(file)):
            missing.append(name)
    assert missing == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_promise_in_a_table_of_promises_names_its_test(document: Path):
    bare: list[str] = []
    promises = False
    for line in document.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not line.startswith("|"):
            promises = False
        elif cells[-1] == HELD_BY:
            promises = True
        elif promises and not set(line) <= set("|- ") and not named(cells[-1]):
            bare.append(line)
    assert bare == []


def test_there_are_tables_of_promises():
    pages = [path.name for path in DOCUMENTS if f"| {HELD_BY} |" in path.read_text()]
    assert {"architecture.md", "reading.md", "data.md", "cluster.md"} <= set(pages)
