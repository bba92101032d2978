"""Beside a project that has packages of the same names, the script runs ours and the project imports its own."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INNER = ("cluster", "data", "pipelines")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the sources, with no index."""
    copy, out = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("wheel")
    for name in ("bcm", *INNER):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    done = subprocess.run(build, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return next(out.glob("*.whl"))


def test_all_lies_in_two_folders_with_its_types(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names if ".dist-info/" not in name} == {"bcm", "bcm_commands"}
    assert {"bcm/py.typed", *(f"bcm_commands/{name}/py.typed" for name in INNER)} <= set(names)
    modules = {str(path.relative_to(ROOT)) for name in ("bcm", *INNER) for path in (ROOT / name).rglob("*.py")}
    assert {name.removeprefix("bcm_commands/") for name in names if name.endswith(".py")} == modules


@pytest.fixture(scope="module")
def project(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's project with packages of its own, and an environment with the wheel."""
    project = tmp_path_factory.mktemp("user project")
    site, script = project / "env" / "site", project / "env" / "bin" / "bcm"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(wheel)], check=True, capture_output=True)
    script.parent.mkdir()
    (site / "bin" / "bcm").rename(script)
    for name in INNER:
        (project / name).mkdir()
        (project / name / "mine.py").write_text(f"OWNER = 'user of {name}'\n")
    (project / "pipelines" / "__init__.py").touch()  # the others have none, which an installed package would hide
    return project


def run(project: Path, *line: str, python_path: str = "") -> subprocess.CompletedProcess[str]:
    path = f"{project / 'env' / 'site'}{os.pathsep}{python_path}"
    env = {"PATH": "/usr/bin:/bin", "HOME": str(project), "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    return subprocess.run([sys.executable, *line], cwd=project, env=env, capture_output=True, text=True)


@pytest.mark.slow
def test_the_script_runs_ours_and_the_project_imports_its_own(project: Path):
    bcm = str(project / "env" / "bin" / "bcm")
    for python_path in ("", str(project)):
        done = run(project, bcm, "prepare", "digits", "--to", "shards", "--dry-run", python_path=python_path)
        assert done.returncode == 0 and "1,500 images, 10 classes" in done.stdout, done.stderr
    trained = run(project, bcm, "prepare", "digits", "--to", "shards")
    assert trained.returncode == 0, trained.stderr
    trained = run(project, bcm, "train", "digits", "--smoke", "--data", "shards")
    assert trained.returncode == 0 and "done: " in trained.stdout, trained.stdout + trained.stderr
    refused = run(project, bcm, "register", trained.stdout.rpartition("done: ")[2].strip())
    assert "Run `env/bin/bcm evaluate " in refused.stderr
    wrong = run(project, bcm, "trian")
    assert wrong.returncode == 2 and "unknown command 'trian'" in wrong.stderr and "  train " in wrong.stderr
    theirs = "import pipelines.mine as a, data.mine as b, cluster.mine as c, bcm; print(a.OWNER, b.OWNER, c.OWNER)"
    done = run(project, "-c", theirs)
    assert done.stdout == "user of pipelines user of data user of cluster\n", done.stderr
