import os
import subprocess
from pathlib import Path

import pytest

from cluster import runtime_env
from cluster.errors import ClusterError
from cluster.runtime_env import git_sha, job_runtime_env


def git(root: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def code(tmp_path: Path) -> Path:
    (tmp_path / "job.py").write_text("print(1)\n")
    return tmp_path


def committed(code: Path) -> str:
    git(code, "init", "-q")
    git(code, "add", ".")
    git(code, "commit", "-qm", "first")
    return git(code, "rev-parse", "HEAD")


def test_the_commit_is_taken_along(code: Path) -> None:
    git(code, "init", "-q")
    assert git_sha(code) == "unknown"
    git(code, "add", ".")
    git(code, "commit", "-qm", "first")
    commit = git(code, "rev-parse", "HEAD")
    assert job_runtime_env(code, {})["env_vars"] == {"BCM_GIT_SHA": commit}
    (code / "job.py").write_text("print(2)\n")
    assert git_sha(code) == f"{commit}+dirty"
    git(code, "checkout", "job.py")
    (code / "new.py").write_text("print(3)\n")
    assert git_sha(code) == f"{commit}+dirty"


def test_what_a_run_leaves_about_does_not_make_the_commit_dirty(code: Path) -> None:
    commit = committed(code)
    for name in ("samples.png", "a picture.png", "runs/x/checkpoint.json", "new folder/notes.txt"):
        (code / name).parent.mkdir(parents=True, exist_ok=True)
        (code / name).write_text("")
    assert git_sha(code) == commit
    (code / "new folder" / "module ü.py").write_text("")
    assert git_sha(code) == f"{commit}+dirty"


def test_an_environment_inside_a_users_repository_has_no_commit_of_it(code: Path) -> None:
    committed(code)
    (code / ".gitignore").write_text("/.venv\n")
    (code / ".venv" / "site").mkdir(parents=True)
    assert git_sha(code / ".venv" / "site") == "unknown"


def test_outside_git_the_commit_is_unknown(code: Path) -> None:
    assert git_sha(code) == "unknown"


def test_plain_settings_pass(code: Path) -> None:
    settings = {"MLFLOW_TRACKING_URI": "http://host:5000", "AWS_ENDPOINT_URL": "http://host:9000", "BCM_GIT_SHA": "abc"}
    assert job_runtime_env(code, settings)["env_vars"] == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_SECRET_ACCESS_KEY", "x"),
        ("AWS_ACCESS_KEY_ID", "x"),
        ("AWS_SESSION_TOKEN", "x"),
        ("MLFLOW_TRACKING_PASSWORD", "x"),
        ("MLFLOW_TRACKING_TOKEN", "x"),
        ("RAY_AUTH_TOKEN", "x"),
        ("WANDB_API_KEY", "x"),
        ("MLFLOW_TRACKING_URI", "http://me:pass@host:5000"),
        ("HARMLESS", "AKIAABCDEFGHIJKLMNOP"),
    ],
)
def test_secrets_are_refused_without_being_repeated(code: Path, name: str, value: str) -> None:
    with pytest.raises(ClusterError, match=name) as caught:
        job_runtime_env(code, {name: value})
    assert value == "x" or value not in str(caught.value)


def test_a_directory_too_big_is_refused_and_its_biggest_file_named(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_env, "SIZE_LIMIT", 2**20)
    (code / "weights.bin").write_bytes(os.urandom(3 * 2**20))
    with pytest.raises(ClusterError, match=r"weights\.bin"):
        job_runtime_env(code, {})


@pytest.mark.parametrize("folder", [".git", ".venv", "runs", "mlruns", "tests"])
def test_what_a_job_never_needs_does_not_count(code: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    monkeypatch.setattr(runtime_env, "SIZE_LIMIT", 2**20)
    (code / folder).mkdir()
    (code / folder / "big.bin").write_bytes(os.urandom(3 * 2**20))
    job_runtime_env(code, {})


def test_a_package_called_data_is_shipped(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_env, "SIZE_LIMIT", 2**20)
    (code / "data").mkdir()
    (code / "data" / "big.bin").write_bytes(os.urandom(3 * 2**20))
    with pytest.raises(ClusterError, match="data/big"):
        job_runtime_env(code, {})


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="nowhere"):
        job_runtime_env(tmp_path / "nowhere", {})
