"""The quickstart as a new user runs it, on a recipe that only shows that every part works."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from PIL import Image

from pipelines.cli import command_line

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = ["--smoke", "--tune-seconds", "1", "--samples", "100", "--storage", "elsewhere"]
MEMORY = 6 * 2**30


def environment(cwd: Path) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return env | {"PYTHONPATH": str(ROOT), "BCM_CACHE_DIR": str(cwd / "cache")}


def start(cwd: Path) -> subprocess.Popen[str]:
    """Start the quickstart in a folder that has a .venv as a clone has."""
    (cwd / ".venv").symlink_to(sys.prefix)
    command, log = [str(cwd / ".venv/bin/python"), "-m", "pipelines.quickstart"], (cwd / "log.txt").open("a")
    return subprocess.Popen([*command, *OPTIONS], cwd=cwd, env=environment(cwd), stdout=log, stderr=log, text=True)


def memory(process: psutil.Process) -> int:
    """Resident memory of a process and all it started, shared pages counted once as Linux' PSS does."""
    total = 0
    for each in [process, *process.children(recursive=True)]:
        try:
            total += each.memory_full_info().pss
        except psutil.Error:
            continue
    return total


def left(processes: set[psutil.Process]) -> list[str]:
    return [p.name() for p in processes if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


def watch(process: subprocess.Popen[str], started: set[psutil.Process]) -> int:
    """Note the processes of a run and its memory, now."""
    try:
        parent = psutil.Process(process.pid)
        started |= set(parent.children(recursive=True))
        return memory(parent)
    except psutil.Error:
        return 0


@pytest.mark.parametrize(
    ("python", "shown"), [("clone/.venv/bin/python", ".venv/bin/python"), ("python", "{tmp}/python")]
)
def test_commands_are_shown_as_they_can_be_typed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, python: str, shown: str
):
    (tmp_path / "clone").mkdir()
    monkeypatch.chdir(tmp_path / "clone")
    monkeypatch.setattr(sys, "executable", str(tmp_path / python))
    line = command_line("pipelines.sample", "models:/a@b", "--out", "my picture.png")
    python = shown.format(tmp=tmp_path)
    assert line == f"{python} -m pipelines.sample models:/a@b --out 'my picture.png'"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["2/7 train", "3/7 tune"])
def test_stopped_in_training_or_tuning_it_leaves_no_process(tmp_path: Path, stage: str):
    process, started = start(tmp_path), set()
    until, log = time.monotonic() + 240, tmp_path / "log.txt"
    while stage not in log.read_text():
        assert process.poll() is None and time.monotonic() < until, log.read_text()[-3000:]
        time.sleep(0.3)
    time.sleep(6)  # Ray's workers are being started
    watch(process, started)
    assert started
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=120) == 130
    assert "Traceback" not in log.read_text()
    assert f"{int(stage[0]) + 1}/7" not in log.read_text()
    time.sleep(1)
    assert not left(started)


@pytest.mark.slow
def test_it_ends_with_a_registered_model_and_leaves_no_process(tmp_path: Path):
    process, started, peak = start(tmp_path), set(), 0
    while process.poll() is None:
        peak = max(peak, watch(process, started))
        time.sleep(0.5)
    log = (tmp_path / "log.txt").read_text()
    assert process.returncode == 0, log[-3000:]
    assert log.count("quickstart passed in") == 1
    assert 0 < peak < MEMORY
    assert not left(started)
    assert len(list((tmp_path / "elsewhere").glob("*/run.json"))) == 1

    assert [path.name for path in tmp_path.rglob("*.png")] == ["quickstart.png"]
    picture = Image.open(tmp_path / "elsewhere" / "quickstart.png")
    assert picture.width > 600 and picture.height > 300
    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    assert str(client.get_model_version_by_alias("bcm-digits-smoke", "champion").version) == "1"
    for shown in ("labels kept", "invert-2"):
        assert shown in log

    lines = re.findall(r"^  (\.venv/bin/python -m .*)$", log, re.MULTILINE)
    assert [line.split()[2] for line in lines] == ["mlflow", "pipelines.sample", "pipelines.sample", "pipelines.train"]
    for line in lines:
        line += " --help" if " mlflow " in line else ""  # it would serve until it is stopped
        done = subprocess.run(line, shell=True, cwd=tmp_path, env=environment(tmp_path), capture_output=True, text=True)
        assert done.returncode == 0, f"{line}\n{done.stderr[-2000:]}"
    pictures = {path.name for path in (tmp_path / "runs" / "pictures").iterdir()}
    assert pictures == {f"bcm-digits-smoke@champion-{name}.png" for name in ("generate-nfe4", "invert")}
