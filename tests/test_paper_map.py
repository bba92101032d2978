"""docs/paper-map.md against the code, in both directions."""

import ast
import importlib
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LONGEST_ALGORITHM = 40
CITATION = re.compile(r"\b(Eq\.|Equations?|Algorithms?) (\d+(?:(?:-|, | and )\d+)*)")
CORE = {f"Eq. {n}" for n in (5, 6, 9, 10, 11, 12, 13, 14, 15)} | {f"Algorithm {n}" for n in range(1, 6)}


@dataclass(frozen=True)
class Row:
    paper: str
    names: tuple[str, ...]


def rows() -> list[Row]:
    """The table's rows: what of the paper, and the names in the second column."""
    lines = (ROOT / "docs" / "paper-map.md").read_text().splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0] == ["paper", "where", "what it says", "deviations"]
    assert all(len(row) == 4 and all(row) for row in cells), "every row has four cells, none of them empty"
    return [Row(row[0], tuple(re.findall(r"`([\w.]+)`", row[1]))) for row in cells[2:]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def docstrings(path: Path) -> dict[str, str]:
    """By qualified name: the docstring of a module and its functions and classes, and the text under its constants.

    The text of a class includes that of its fields and methods.
    """
    tree, name = ast.parse(path.read_text()), module_name(path)
    found = {name: ast.get_docstring(tree) or ""}
    for node, below in zip(tree.body, [*tree.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef):
            found[f"{name}.{node.name}"] = ast.get_docstring(node) or ""
        elif isinstance(node, ast.ClassDef):
            found[f"{name}.{node.name}"] = "\n".join(
                inner.value.value
                for inner in ast.walk(node)
                if isinstance(inner, ast.Expr)
                and isinstance(inner.value, ast.Constant)
                and isinstance(inner.value.value, str)
            )
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(below, ast.Expr):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            if isinstance(target, ast.Name) and isinstance(below.value, ast.Constant):
                found[f"{name}.{target.id}"] = str(below.value.value)
    return found


def package(name: str) -> dict[str, str]:
    """The docstrings of a whole package."""
    return {key: text for path in sorted((ROOT / name).rglob("*.py")) for key, text in docstrings(path).items()}


def citations(text: str) -> set[str]:
    """`Eq. 13-15` -> Eq. 13, Eq. 14, Eq. 15; likewise lists, and algorithms."""
    cited: set[str] = set()
    for kind, numbers in CITATION.findall(text):
        label = "Eq." if kind.startswith("Eq") else "Algorithm"
        for first, last in re.findall(r"(\d+)(?:-(\d+))?", numbers):
            cited |= {f"{label} {n}" for n in range(int(first), int(last or first) + 1)}
    return cited


def cites(text: str, paper: str) -> bool:
    if paper.startswith(("Eq.", "Algorithm")):
        return paper in citations(text)
    return re.search(rf"\b{re.escape(paper)}(?![\d.]*\d)", text, re.IGNORECASE) is not None


ROWS = rows()
DOCS = package("bcm") | package("pipelines")


def test_citations_are_read_as_written():
    assert citations("(Eq. 6, 9, 10)") == {"Eq. 6", "Eq. 9", "Eq. 10"}
    assert citations("numbers of Eq. 13-15, see Algorithm 2 and Algorithm 4") == {
        *("Eq. 13", "Eq. 14", "Eq. 15"),
        *("Algorithm 2", "Algorithm 4"),
    }
    assert cites("as in footnote 2", "Footnote 2") and cites("(Section 3.4): x", "Section 3.4")
    assert not cites("Section 3.41", "Section 3.4") and not cites("Eq. 15", "Eq. 1")


def test_the_map_covers_the_method():
    assert {row.paper for row in ROWS} >= CORE


@pytest.mark.parametrize(("paper", "name"), [(row.paper, name) for row in ROWS for name in row.names])
def test_a_named_object_exists_and_its_docstring_names_its_row(paper: str, name: str):
    if (ROOT / Path(*name.split("."))).with_suffix(".py").is_file():
        importlib.import_module(name)
    else:
        module, _, member = name.rpartition(".")
        assert hasattr(importlib.import_module(module), member), f"{name} does not exist"
    assert cites(DOCS.get(name, ""), paper), f"the docstring of {name} does not name {paper}"


def test_every_row_names_an_object():
    assert [row.paper for row in ROWS if not row.names] == []


def test_whatever_cites_an_equation_or_algorithm_is_in_the_map():
    mapped = {(row.paper, name) for row in ROWS for name in row.names}
    modules = {module_name(path) for path in (ROOT / "bcm").rglob("*.py")}
    public = {
        name: text
        for name, text in package("bcm").items()
        if name not in modules and not name.rpartition(".")[2].startswith("_")
    }
    missing = [
        f"{name} cites {paper}"
        for name, text in public.items()
        for paper in sorted(citations(text))
        if (paper, name) not in mapped
    ]
    assert not missing, f"docs/paper-map.md lacks: {'; '.join(missing)}"


@pytest.mark.parametrize("row", [row for row in ROWS if row.paper.startswith("Algorithm")], ids=lambda row: row.paper)
def test_an_algorithm_is_one_short_function_named_in_its_first_docstring_line(row: Row):
    module, _, name = row.names[0].rpartition(".")
    tree = ast.parse((ROOT / Path(*module.split("."))).with_suffix(".py").read_text())
    (function,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name]
    length = (function.end_lineno or 0) - function.lineno + 1
    assert length <= LONGEST_ALGORITHM, f"{row.names[0]} has {length} lines"
    assert row.paper in citations((ast.get_docstring(function) or "").splitlines()[0])
