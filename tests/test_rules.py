"""Rules of the design that no other tool checks."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path
from typing import TypeGuard

import pytest
import yaml

from benchmarks.house import counts, outside_rooms

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("bcm", "cluster", "data", "pipelines")
LONGEST_FUNCTION = 60
LONGEST_FILE, LONGEST_TEST_FILE = 300, 420
MOST_FUNCTIONS, MOST_CLASSES, MOST_OUTSIDE_ROOMS = 685, 127, 14
FOREIGN = ("ray", "mlflow", "webdataset", "fsspec", "tyro")
"""What `import bcm` must not load."""
NEVER_IMPORTED = {"s3fs": "fsspec imports it where a URL begins with s3://"}
"""Distributions that are declared though no module imports them, and why."""
UNPICKLERS = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}
UNPICKLING_ALLOWED = Path("data/prepare/cifar10.py")
"""The official archive is a pickle; its reader checks the MD5 and admits three numpy names."""
LOADER = "pipelines/models/foreign.py"
"""Reads the files of other code bases, with torch.load where it is told to take nothing but tensors."""


@cache
def sources(*packages: str) -> list[tuple[Path, str, ast.Module]]:
    """Relative path, text and syntax tree of every Python file, by default of packages, tests and benchmarks."""
    folders = packages or (*PACKAGES, "tests", "benchmarks")
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [(path.relative_to(ROOT), path.read_text(), ast.parse(path.read_text())) for path in paths]


def nodes(*packages: str) -> Iterator[tuple[str, ast.AST]]:
    for path, _, tree in sources(*packages):
        for node in ast.walk(tree):
            yield f"{path}:{getattr(node, 'lineno', 0)}", node


def run(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(cwd)}
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)


def test_importing_all_of_bcm_loads_no_framework():
    code = (
        "import importlib, json, pkgutil, sys, bcm\n"
        "names = [module.name for module in pkgutil.walk_packages(bcm.__path__, 'bcm.')]\n"
        "for name in names: importlib.import_module(name)\n"
        f"print(json.dumps([names, [name for name in {FOREIGN} if name in sys.modules]]))"
    )
    done = run(code, ROOT)
    assert done.returncode == 0, done.stderr
    names, loaded = json.loads(done.stdout)
    assert {"bcm.training", "bcm.networks.ncsnpp"} <= set(names)
    assert loaded == []


@pytest.mark.slow
def test_bcm_passes_its_tests_with_the_other_packages_removed(tmp_path: Path):
    for folder in ("bcm", "tests/bcm"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("tests/conftest.py", "tests/oracle.py", "tests/small.py", "pyproject.toml"):
        shutil.copy(ROOT / file, tmp_path / file)
    # An editable install would find the removed packages in the checkout: None forbids their import.
    forbidden = ("cluster", "data", "pipelines", *FOREIGN)
    options = ["tests/bcm", "-m", "not slow", "-x", "-q", "-p", "no:cacheprovider"]
    code = f"import pytest, sys\nsys.modules |= dict.fromkeys({forbidden})\nsys.exit(pytest.main({options}))"
    done = run(code, tmp_path)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"\d+ passed", done.stdout)


def test_nothing_is_unpickled():
    found: list[str] = []
    for place, node in nodes(*PACKAGES, "benchmarks"):
        names = imported(node)
        if {name.split(".")[0] for name in names} & UNPICKLERS and not place.startswith(str(UNPICKLING_ALLOWED)):
            found.append(f"{place} imports {', '.join(names)}")
        if isinstance(node, ast.keyword) and node.arg == "allow_pickle" and ast.unparse(node.value) != "False":
            found.append(f"{place} allows pickles")
    safe = {id(node.func) for place, node in nodes() if place.startswith(LOADER) and is_safe_load(node)}
    found += [f"{place} calls torch.load" for place, node in nodes() if is_torch_load(node) and id(node) not in safe]
    assert found == []


def is_safe_load(node: ast.AST) -> TypeGuard[ast.Call]:
    arguments = {a.arg: ast.unparse(a.value) for a in node.keywords} if isinstance(node, ast.Call) else {}
    return isinstance(node, ast.Call) and is_torch_load(node.func) and arguments.get("weights_only") == "True"


def is_torch_load(node: ast.AST) -> bool:
    imported = isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in [a.name for a in node.names]
    return imported or (isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.load")


def test_no_bare_except():
    assert [place for place, node in nodes() if isinstance(node, ast.ExceptHandler) and node.type is None] == []


def test_no_path_of_anybodys_machine():
    # The cluster file is left out: its paths are those of Ray's container image.
    files = [path for path, _, _ in sources()] + [path.relative_to(ROOT) for path in (ROOT / "docs").rglob("*.md")]
    files += [path.relative_to(ROOT) for path in ROOT.glob("*") if path.suffix in (".md", ".toml")]
    files += [Path("Makefile"), Path(".ci/run"), Path("requirements.lock")]
    personal = re.compile("/(?:" + "home|root|Users" + ")/")
    assert [str(path) for path in files if personal.search((ROOT / path).read_text())] == []


def test_functions_and_files_stay_short():
    long = [
        f"{place} {node.name} has {length} lines"
        for place, node in nodes()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > LONGEST_FUNCTION
    ]
    for path, text, _ in sources():
        limit = LONGEST_TEST_FILE if path.parts[0] == "tests" else LONGEST_FILE
        long += [f"{path} has {length} lines"] if (length := text.count("\n")) > limit else []
    assert long == []


def test_the_house_does_not_grow_in_silence():
    rows = counts(ROOT).values()
    assert sum(row["functions"] for row in rows) <= MOST_FUNCTIONS
    assert sum(row["classes"] for row in rows) <= MOST_CLASSES
    assert len(outside_rooms(ROOT)) <= MOST_OUTSIDE_ROOMS


def test_every_public_module_has_a_docstring():
    public = [(path, tree) for path, _, tree in sources(*PACKAGES) if not path.name.startswith("_")]
    public += [(path, tree) for path, _, tree in sources(*PACKAGES) if path.name == "__init__.py"]
    assert len(public) > 40
    assert [str(path) for path, tree in public if not ast.get_docstring(tree)] == []


def test_declared_dependencies_are_exactly_the_imported_ones():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [project["optional-dependencies"]["lsun"]]
    declared = {canonical(text) for texts in (project["dependencies"], *extras) for text in texts}
    modules = {name.split(".")[0] for _, node in nodes(*PACKAGES) for name in imported(node)}
    foreign = modules - sys.stdlib_module_names - set(PACKAGES)
    # Several distributions may bring a module, as mlflow and mlflow-skinny do: one that is declared is meant.
    bringing = [{canonical(name) for name in packages_distributions()[module]} for module in foreign]
    used = set().union(*(names & declared or names for names in bringing))
    assert declared == used | set(NEVER_IMPORTED)


def canonical(requirement: str) -> str:
    """The name of a distribution as package indexes compare it, without versions and extras."""
    return re.sub("[-_.]+", "-", re.split(r"[\s\[<>=!~;]", requirement)[0]).lower()


def imported(node: ast.AST) -> list[str]:
    """The modules an import statement names, with what is taken from them; none for a relative one."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module and not node.level:
        return [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def test_what_ray_keeps_private_is_imported_in_one_file():
    users = {
        place.rpartition(":")[0]
        for place, node in nodes()
        for name in imported(node)
        if re.match(r"ray\..*\b(_|cluster_utils)", name)
    }
    assert users == {"cluster/ray_internals.py", "tests/cluster/test_ray_internals.py"}


def test_bare_make_says_what_each_target_does():
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    shown = subprocess.run(
        ["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert [line.split()[:2] for line in shown.splitlines()] == [["make", target] for target in targets]
    assert all(len(line.split()) > 3 for line in shown.splitlines())


def test_a_commit_is_checked_as_make_check_does():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    checks = re.search(r"^check:.*\n((?:\t.*\n)+)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert checks is not None
    wanted = [line.strip().replace("$(BIN)", ".venv/bin") for line in checks[1].splitlines()]
    assert [hook["entry"] for hook in hooks] == [re.sub(r"( --check)?( \.)?$", "", line) for line in wanted]
