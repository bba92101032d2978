"""What the README and the notebook show works as it stands, in a new folder, with nothing activated."""

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

ELSEWHERE = {
    "make quickstart": "trains for minutes; test_quickstart.py runs all its stages",
    "make test": "runs this very test",
    ".venv/bin/ray up ray_cluster.yaml": "starts machines in a cloud, which costs money",
    ".venv/bin/ray job submit --address http://HEAD:8265 --working-dir . -- "
    "python -m pipelines.train digits --storage s3://BUCKET/runs --data s3://BUCKET/digits": "needs that cluster",
}
"""Commands of the README that are not run here, and why."""


def shown_commands() -> list[str]:
    """The commands in the README's indented blocks, without their comments, lines that go on put together."""
    lines = re.sub(r"\\\n\s*", "", README).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if re.match(r"    (make |\.venv/)", line)]


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


def test_the_reasons_why_commands_are_not_run_are_those_of_commands_that_are_shown():
    assert set(ELSEWHERE) <= set(shown_commands())
    assert len(set(shown_commands()) - set(ELSEWHERE)) >= 5


@pytest.mark.slow
def test_every_command_of_the_readme_works_copied_as_it_stands(clone: World):
    for command in shown_commands():
        if command not in ELSEWHERE:
            done = typed(command, clone.root)
            assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    with Image.open(clone.root / "samples.png") as picture:
        assert picture.width > 600
    assert (clone.root / "coverage.png").is_file()


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
