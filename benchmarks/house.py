"""Counts the house: functions, classes, longest file and function, modules of `pipelines` that stand in no room.

python -m benchmarks.house [ROOT]

Functions are every `def`, methods and nested ones too; ROOT is a checkout, by default this one.
"""

import ast
import sys
from collections import Counter
from pathlib import Path

PACKAGES = ("bcm", "cluster", "data", "pipelines")
FUNCTIONS = ast.FunctionDef | ast.AsyncFunctionDef


def sources(root: Path) -> dict[Path, str]:
    """The text of every Python file of the product, by its path from the root."""
    paths = sorted(path for package in PACKAGES for path in (root / package).rglob("*.py"))
    return {path.relative_to(root): path.read_text() for path in paths}


def counts(root: Path) -> dict[str, Counter[str]]:
    """Functions, classes, lines and modules of each package."""
    table = {package: Counter[str]() for package in PACKAGES}
    for path, text in sources(root).items():
        nodes = list(ast.walk(ast.parse(text)))
        table[path.parts[0]] += Counter(
            functions=sum(isinstance(node, FUNCTIONS) for node in nodes),
            classes=sum(isinstance(node, ast.ClassDef) for node in nodes),
            lines=text.count("\n"),
            modules=1,
        )
    return table


def longest(root: Path) -> tuple[tuple[int, str], tuple[int, str]]:
    """Lines and name of the longest file and of the longest function."""
    files = [(text.count("\n"), str(path)) for path, text in sources(root).items()]
    functions = [
        ((node.end_lineno or 0) - node.lineno + 1, f"{path}:{node.name}")
        for path, text in sources(root).items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, FUNCTIONS)
    ]
    return max(files), max(functions)


def outside_rooms(root: Path) -> list[str]:
    """The modules of `pipelines` that are in no room."""
    return sorted(path.name for path in (root / "pipelines").glob("*.py"))


def main() -> None:
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parents[1]
    table = counts(root)
    table["all"] = sum(table.values(), Counter())
    print(f"{'':10}  functions  classes   lines  modules")
    for package, row in table.items():
        print(f"{package:10}  {row['functions']:9}  {row['classes']:7}  {row['lines']:6}  {row['modules']:7}")
    for what, (lines, name) in zip(("file", "function"), longest(root), strict=True):
        print(f"longest {what}: {name}, {lines} lines")
    modules = outside_rooms(root)
    print(f"modules of pipelines in no room: {len(modules)}: {', '.join(modules)}")


if __name__ == "__main__":
    main()
