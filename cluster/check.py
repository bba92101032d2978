"""Checks a cluster file (`ray up`) without a cloud: Ray's own validation, and EC2's for what Ray passes through."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from cluster.ray_internals import cluster_file_problems
from cluster.runtime_env import looks_secret


def check_cluster_file(path: str | Path) -> list[str]:
    """Problems of the cluster file at `path`, in words; an empty list means it is fine."""
    try:
        text = Path(path).read_text()
        config = yaml.safe_load(text)
    except (OSError, yaml.YAMLError) as error:
        return [f"{path}: cannot be read as YAML: {error}"]
    if not isinstance(config, dict):
        return [f"{path}: holds no mapping"]
    problems = []
    for number, line in enumerate(text.splitlines(), 1):
        # A line like `export NAME=value`, or anything that holds a value without a name.
        name, equals, value = line.partition("=")
        named = bool(equals and name.split() and value)
        if looks_secret(name.split()[-1] if named else "", value if named else line):
            problems.append(f"{path}: line {number} holds a secret")
    problems += [f"{path}: {problem}" for problem in cluster_file_problems(config)]
    if isinstance(config.get("provider"), dict) and config["provider"].get("type") == "aws":
        problems += [f"{path}: {problem}" for problem in _ec2_problems(config)]
    return problems


def _ec2_problems(config: dict[str, Any]) -> list[str]:
    """Mistakes inside `node_config`, which Ray hands to EC2 RunInstances unread."""
    import botocore.session
    from botocore.validate import ParamValidator

    shape = botocore.session.get_session().get_service_model("ec2").operation_model("RunInstances").input_shape
    problems: list[str] = []
    node_types = config.get("available_node_types")
    for name, node_type in node_types.items() if isinstance(node_types, dict) else ():
        node_config = node_type.get("node_config", {}) if isinstance(node_type, dict) else {}
        # Ray adds the counts itself.
        report = ParamValidator().validate({"MinCount": 1, "MaxCount": 1, **node_config}, shape)
        if report.has_errors():
            lines = report.generate_report().splitlines()
            problems += [f"available_node_types/{name}/node_config: {line}" for line in lines]
    return problems


def main() -> int:
    """Check a cluster file; prints its problems and exits with 1 if there are any."""
    parser = argparse.ArgumentParser(prog="python -m cluster.check", description=main.__doc__)
    parser.add_argument("path", help="for instance ray_cluster.yaml")
    options = parser.parse_args()
    problems = check_cluster_file(options.path)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{options.path}: fine")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
