"""What the README and the notebook show works as it stands, in a new folder, with nothing activated."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from world import Command, World

from bcm.inference import Toolkit

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
NOTEBOOK = ROOT / "examples" / "first_model.ipynb"

DOCUMENTS = (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md")))

STARTS = r"(make |\.venv/|python -m |ray |mlflow |rclone |export |mkdir |[A-Z_]+=\S+ )"
"""What the commands in indented blocks begin with."""

ELSEWHERE = {
    "make": "trains, tests, or installs, for minutes; test_quickstart.py runs all stages of the quickstart",
    "ray": "needs a cluster; its options are read by Ray's own parser",
    "cluster.submit": "needs a cluster; its options and those of the command it submits are read by their own parsers",
    "cluster.local": "runs until it is stopped; test_local.py starts it",
    "mlflow": "serves until it is stopped; its options are read by MLflow's own parser",
    "rclone": "serves until it is stopped; servers.py starts it for the tests",
    "pipelines": "names a bucket, a run or a set that only its reader has; its options are read by its own parser",
    "ruff": "would change the checkout that is tested; `make check` runs it",
}
"""Kinds of command that are not run here, why, and what is done in their place."""


def shown_in(text: str) -> list[str]:
    """The commands in the indented blocks of a text, without their comments, lines that go on put together."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if re.match("    " + STARTS, line)]


def shown_commands() -> list[str]:
    """The commands of the README that are run as they stand."""
    return [line for line in shown_in(README) if line.startswith(".venv/") and kind_of(line) is None]


def kind_of(line: str) -> str | None:
    """Why a command is not run as it stands: a key of `ELSEWHERE`; None where it is."""
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(line) if not re.match("[A-Z_]+=", word)]
    if words[:2] == ["python", "-m"]:
        placeholder = re.search(r"\b[A-Z]{3,}\b|s3://", line.replace("MLFLOW_TRACKING_URI", ""))
        return words[2] if words[2] in ELSEWHERE else "pipelines" if placeholder else None
    return words[0] if words and words[0] in ELSEWHERE else None


class ParsedError(Exception):
    """Raised in place of the work, once the options have been read."""


def parse(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a command's options by its own parser; a wrong one is an error."""

    def stop(*_: Any, **__: Any) -> Any:
        raise ParsedError

    if words[:2] != ["python", "-m"]:
        group = {"ray": "ray.scripts.scripts", "mlflow": "mlflow.cli"}[words[0]]
        found: Any = importlib.import_module(group).cli
        names = words[1:]
        while hasattr(found, "commands") and names:
            found = found.commands[names.pop(0)]
        found.make_context("x", names)
        if "--" in words:
            parse(words[words.index("--") + 1 :], monkeypatch)
        return
    module: Any = importlib.import_module(words[2])
    if words[2].startswith("cluster."):
        monkeypatch.setattr(sys, "argv", words[2:])
        monkeypatch.setattr(module, {"cluster.submit": "submit", "cluster.local": "local_cluster"}[words[2]], stop)
        with pytest.raises(ParsedError):
            module.main()
        if "--" in words:
            parse(words[words.index("--") + 1 :], monkeypatch)
        return
    real = module.parse

    def parse_and_stop(*arguments: Any, **options: Any) -> Any:
        real(*arguments, **options)
        raise ParsedError

    with monkeypatch.context() as patched:
        patched.setattr(module, "parse", parse_and_stop)
        with pytest.raises(ParsedError):
            module.main(words[3:])


OF_OTHERS = [
    (document.name, line)
    for document in DOCUMENTS
    for line in shown_in(document.read_text())
    if kind_of(line) not in (None, "make", "rclone", "ruff")
    or (document.name != "README.md" and line.startswith("python -m pipelines."))
]


@pytest.mark.parametrize(("document", "line"), OF_OTHERS)
def test_the_options_of_commands_that_are_not_run_are_right(document: str, line: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(ROOT)
    words = [word.removeprefix(".venv/bin/") for word in shlex.split(line)]
    while re.match("[A-Z_]+=", words[0]):
        words.pop(0)
    parse(words, monkeypatch)


def test_every_shown_command_is_run_read_or_said_to_be_of_a_kind():
    """A new one in a document lands in one of these; an indented line that looks like none of them is no command."""
    settled_elsewhere = {*shown_commands(), *(line for _, line in OF_OTHERS)}
    for document in DOCUMENTS:
        for line in shown_in(document.read_text()):
            settled = line.startswith(("export ", "mkdir ")) or line in settled_elsewhere or kind_of(line) is not None
            # test_check.py does the one, and test_own_images.py types all of the page.
            checked = line == "python -m cluster.check ray_cluster.yaml" or document.name == "own-images.md"
            assert settled or checked, f"{document.name}: {line}"


def typed(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """What happens when `command` is typed in a shell that knows nothing of this project but the folder it is in."""
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}
    return subprocess.run(["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.fixture
def clone(world: World, command: Command) -> World:
    """A folder like a clone after `make quickstart`: the packages, .venv, shards, and a champion of random weights."""
    assert command("evaluate", str(world.run), "--samples", "10", "--images", "10").code == 0
    assert command("register", str(world.run), "--name", "bcm-digits").code == 0
    (world.runs / "data").mkdir()
    shutil.move(world.data, world.runs / "data" / "digits")
    for package in ("bcm", "cluster", "data", "pipelines"):
        (world.root / package).symlink_to(ROOT / package)
    (world.root / ".venv").symlink_to(sys.prefix)
    shutil.copy(world.mlflow.removeprefix("sqlite:///"), world.runs / "mlflow.db")
    return world


def test_the_kinds_that_are_not_run_are_shown_somewhere():
    lines = [line for document in DOCUMENTS for line in shown_in(document.read_text())]
    assert {kind_of(line) for line in lines} - {None} == set(ELSEWHERE)
    assert len(shown_commands()) >= 6


@pytest.mark.slow
def test_every_command_of_the_readme_works_copied_as_it_stands(clone: World):
    for command in shown_commands():
        done = typed(command, clone.root)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    with Image.open(clone.root / "runs" / "pictures" / "bcm-digits@champion-all.png") as picture:
        assert picture.width > 600
    assert (clone.root / "runs" / "coverage.png").is_file()
    assert not [*clone.root.glob("*.png")]


TABLE = {re.findall(r"`([^`]+)`", line)[0]: line for line in README.splitlines() if line.startswith("| `")}
"""Rows of the README's table by the command they are about."""


def test_the_table_shows_every_command():
    """A command is a module beside the rooms that has a `main` for a command line."""
    modules = {path.stem for path in (ROOT / "pipelines").glob("*.py") if "run_command(main)" in path.read_text()}
    assert {row.split()[0] for row in TABLE} == modules


@pytest.mark.parametrize("row", TABLE)
def test_the_commands_and_options_of_the_table_exist(command: Command, row: str):
    module, *arguments = row.split()
    chosen = ["digits" if argument == "RECIPE" else argument for argument in arguments]
    outcome = command(module, *(argument for argument in chosen if argument in ("digits", "coverage")), "--help")
    assert outcome.code == 0
    for option in re.findall(r"--[a-z-]+", TABLE[row]):
        assert re.search(rf"{option}\b", outcome.out), option


def test_the_snippet_of_the_method_gives_images_without_dropout():
    (snippet,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    values: dict[str, Any] = {}
    torch.manual_seed(0)
    exec(snippet.replace("NCSNppConfig()", "NCSNppConfig(width=32, dropout=0.5)"), values)
    assert values["x"].shape == (4, 3, 32, 32) and values["x"].isfinite().all()
    assert not any(module.training for module in values["f"].modules())


# ---- the notebook


def cells(kind: str) -> list[str]:
    notebook = json.loads(NOTEBOOK.read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["language"]) == (4, "python")
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == kind]


@pytest.mark.slow
def test_the_notebook_runs_from_its_folder(clone: World, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (clone.root / "examples").mkdir()
    monkeypatch.chdir(clone.root / "examples")
    shown: dict[str, Any] = {}
    for cell in cells("code"):
        exec(compile(cell, str(NOTEBOOK), "exec"), shown)
    toolkit: Toolkit = shown["toolkit"]
    assert os.getcwd() == str(clone.root)
    assert [images.shape for images in shown["samples"].values()] == [(12, 1, 8, 8)] * 4
    # The ends of the arc are the two noises, so what stands there is the two reconstructions.
    x = shown["reconstructions"]
    torch.testing.assert_close(shown["on_the_way"][[0, -1]], x[[0, 1]], atol=1e-3, rtol=1e-3)
    assert shown["noise"].shape == x.shape == (12, 1, 8, 8)
    assert shown["on_the_way"].isfinite().all() and toolkit.network.classes == 0
    norms = shown["arc"].flatten(1).norm(dim=1)
    assert (norms >= norms[[0, -1]].min() * 0.99).all()


def test_the_notebook_is_kept_without_outputs_and_says_how_to_go_on():
    notebook = json.loads(NOTEBOOK.read_text())
    assert not any(cell["outputs"] or cell["execution_count"] for cell in notebook["cells"] if "outputs" in cell)
    (line,) = re.findall(r"`(\.venv/bin/python -m pipelines[^`]*)`", cells("markdown")[-1])
    assert line in shown_commands()
    assert shlex.split(line)[3] == re.findall(r'model_at\("([^"]+)"\)', "\n".join(cells("code")))[0]
