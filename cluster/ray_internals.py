"""All that this project uses of Ray without its promise: one function each, so that a new Ray breaks one file.

`tests/cluster/test_ray_internals.py` tests each. Ray is imported inside the functions, since that takes seconds.
"""

from __future__ import annotations

import contextlib
import io
import os
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray._private.node import Node as Node
    from ray.cluster_utils import Cluster


def ask_for_token() -> None:
    """Make Ray processes started from here demand a token, unless the user chose otherwise.

    It stays the same for the life of this process, because Ray keeps what it read first.
    """
    from ray._raylet import AuthenticationTokenLoader, Config  # pyright: ignore[reportAttributeAccessIssue]

    if "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        # Ray has read the mode at its import.
        Config.initialize("")
        AuthenticationTokenLoader.instance().reset_cache()


def note_address(folder: Path, address: str) -> None:
    """Tell the actors of the Ray whose files are in `folder` which cluster they are in.

    Without the note, where another Ray runs on this machine, the actor that watches Ray Train's controller asks that
    one, does not find the controller there, and takes a healthy training's resources away.
    """
    (folder / "ray" / "ray_current_cluster").write_text(address)


def most_resources() -> Mapping[str, float]:
    """What the connected cluster can grow to by its autoscaler, in Ray's names; empty if it has none."""
    from ray._private.state import state

    return state.get_max_resources_from_cluster_config() or {}


def cluster_file_problems(config: dict[str, Any]) -> list[str]:
    """What `ray up` finds wrong with a cluster file, in words."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    try:
        # Ray greets on stdout.
        with contextlib.redirect_stdout(io.StringIO()):
            validate_config(prepare_config(config))
    except Exception as error:
        # jsonschema's errors carry the place; Ray raises many other kinds.
        place = "/".join(str(part) for part in getattr(error, "absolute_path", ()))
        message = getattr(error, "message", None) or str(error) or type(error).__name__
        return [f"{place}: {message}" if place else message]
    return []


def package_bytes(root: Path, excludes: Sequence[str]) -> int:
    """Bytes of the zip that a job would upload of its working directory."""
    from ray._private.runtime_env.packaging import create_package

    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "working_dir.zip"
        create_package(str(root), package, include_gitignore=True, excludes=list(excludes))
        return package.stat().st_size


def several_nodes() -> Cluster:
    """A cluster to which nodes on this machine can be added, none yet."""
    from ray.cluster_utils import Cluster

    return Cluster()


def unwrapped(error: BaseException) -> list[BaseException]:
    """What one of Ray's wrappers holds, workers in the order of their ranks; [] for an error that wraps nothing."""
    failures: Any = getattr(error, "worker_failures", None)
    if failures:
        return [failures[rank] for rank in sorted(failures)]
    held = [getattr(error, name, None) for name in ("controller_failure", "health_check_failure", "_base_exc", "cause")]
    return [inner for inner in held if isinstance(inner, BaseException)][:1]
