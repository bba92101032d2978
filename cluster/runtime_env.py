"""What is shipped with a job: the working directory, plain settings, the git commit; never a secret."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cluster import ray_internals
from cluster.errors import ClusterError

SIZE_LIMIT = 100 * 2**20
"""Bytes of zip the job server accepts."""

EXCLUDES = (
    ".git",
    ".venv",
    "__pycache__",
    ".pytest_cache",
    ".ruff_cache",
    "/runs",
    "/mlruns",
    "/mlartifacts",
    "mlflow.db*",
    "/tests",
    "/docs",
)
"""What a job never needs, in .gitignore's syntax; the directory's own .gitignore is respected too."""

SHA_VARIABLE = "BCM_GIT_SHA"
"""Environment variable that carries the commit of the code a job runs."""

_SECRET_NAME = re.compile(r"SECRET|TOKEN|PASSW|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_KEY", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"://[^/@\s]*:[^/@\s]*@|AKIA[0-9A-Z]{16}|-----BEGIN")


def job_runtime_env(working_dir: str | Path, env_vars: Mapping[str, str]) -> dict[str, Any]:
    """Ray runtime environment of a job that runs the code in `working_dir`.

    Raises:
        ClusterError: no such directory, more than the job server takes, or a secret among `env_vars`.
    """
    root = Path(working_dir)
    if not root.is_dir():
        raise ClusterError(f"{root}: no such directory to ship with the job")
    refuse_secrets(env_vars, "the job's environment")
    size = ray_internals.package_bytes(root, EXCLUDES)
    if size > SIZE_LIMIT:
        files = [(path.stat().st_size, path) for path in root.rglob("*") if path.is_file()]
        biggest = [f"{path.relative_to(root)} ({bytes_ / 2**20:.0f} MiB)" for bytes_, path in sorted(files)[:-4:-1]]
        raise ClusterError(
            f"{root}: {size / 2**20:.0f} MiB zipped, more than the {SIZE_LIMIT / 2**20:.0f} MiB the job server takes; "
            f"keep data and runs elsewhere or list them in {root / '.gitignore'}; biggest: {', '.join(biggest)}"
        )
    shipped = {SHA_VARIABLE: git_sha(root)} | dict(env_vars)
    return {"working_dir": str(root), "excludes": list(EXCLUDES), "env_vars": shipped}


def refuse_secrets(env_vars: Mapping[str, str], where: str) -> None:
    """Raise ClusterError if a name or a value looks like a secret: Ray keeps these in clear and shows them."""
    for name, value in env_vars.items():
        if looks_secret(name, value):
            raise ClusterError(
                f"{name} looks like a secret and would be stored in clear in {where}; give it to the nodes instead "
                "(IAM role, or the environment of `ray start`), or name a file there that holds it"
            )


def looks_secret(name: str, value: str) -> bool:
    """Whether a setting's name or value is like that of a key, a token, a password, or a URL with a password."""
    return bool(_SECRET_NAME.search(name) or _SECRET_VALUE.search(value))


def git_sha(root: str | Path) -> str:
    """Commit of the working tree around `root`, with "+dirty" if its code was changed since; "unknown" outside git.

    Code is what git tracks, and new Python files that it does not ignore; pictures and data left about are not. Where
    git tracks nothing in `root`, as in a virtual environment in a user's repository, the code is none of that tree's.
    """
    command = ["git", "-C", str(root), "status", "--porcelain=v2", "--branch", "--untracked-files=all"]
    try:
        status = subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.splitlines()
        tracked = subprocess.run(["git", "-C", str(root), "ls-files"], capture_output=True, timeout=60).stdout
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    commit = next((line.split()[-1] for line in status if line.startswith("# branch.oid ")), "(initial)")
    if commit == "(initial)" or not tracked:
        return "unknown"
    changed = any(line[0] not in "#?" or (line[0] == "?" and line.rstrip('"').endswith(".py")) for line in status)
    return commit + ("+dirty" if changed else "")
