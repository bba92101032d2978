"""What is printed can be typed where it was printed, and read no further than its reader wants."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from world import Command

from pipelines.__main__ import COMMANDS, usage
from pipelines.cli import command_line, typable

ROOT = Path(__file__).resolve().parents[2]


def test_a_script_is_shown_as_it_was_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "env" / "bin" / "bcm"), "sample"])
    assert command_line("pipelines.train", "digits", "a b") == "env/bin/bcm train digits 'a b'"
    assert typable("Run `python -m pipelines.evaluate x`.") == "Run `env/bin/bcm evaluate x`."
    monkeypatch.chdir(tmp_path / "..")
    assert command_line("pipelines.train") == f"{tmp_path.name}/env/bin/bcm train"
    script = tmp_path / "env" / "bin" / "bcm"
    script.parent.mkdir(parents=True)
    script.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(script.parent))
    assert command_line("pipelines.train") == "bcm train"


def test_a_job_shows_no_path_of_its_node(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    assert command_line("pipelines.tune", "x") == "python -m pipelines.tune x"


def test_the_script_lists_every_command():
    modules = {path.stem for path in (ROOT / "pipelines").glob("*.py") if "run_command(main)" in path.read_text()}
    assert set(COMMANDS) == modules
    assert all(f"\n  {name} " in usage() for name in COMMANDS)


@pytest.mark.parametrize(
    ("line", "name"),
    [
        *(("evaluate", "MODEL"), ("sample", "MODEL"), ("tune", "RUN"), ("register", "RUN"), ("import_weights", "FILE")),
        *(("prepare", "NAME"), ("prepare verify", "URL"), ("report coverage", "RECIPE")),
    ],
)
def test_help_calls_arguments_what_the_readme_does(command: Command, line: str, name: str):
    out = command(*line.split(), "--help").out
    assert re.search(rf"^\W*{name}  +\w", out, re.MULTILINE) and "STR " not in out.splitlines()[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "line",
    ["pipelines.train --help", "pipelines.sample --help", "pipelines.train digits --dry-run", "pipelines --help"],
)
def test_a_reader_that_leaves_early_gets_no_traceback(line: str):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-m", *line.split()], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout and process.stderr
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() == 141
