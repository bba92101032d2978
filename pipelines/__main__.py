"""The script `bcm NAME ...`, and `python -m pipelines NAME ...`: one door to all commands.

A wheel keeps `pipelines`, `cluster` and `data` in a folder `bcm_commands`, where they hide nobody's own packages of
these names. Until that folder is on Python's path, nothing but Python's own modules is imported here.
"""

import ast
import sys
from importlib import import_module
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
"""The folder that holds the packages: of a wheel `bcm_commands`, of a checkout its root."""

COMMANDS = ("prepare", "train", "tune", "evaluate", "register", "sample", "import_weights", "report", "quickstart")


def main() -> None:
    """The command line: the first argument is the command, the rest its own."""
    name, *rest = sys.argv[1:] or ["--help"]
    name = name.replace("-", "_")
    sys.path.insert(0, str(HOME))
    if name in COMMANDS:
        sys.argv[1:] = rest
        import_module("pipelines.cli").run_command(import_module(f"pipelines.{name}").main)
    asked = name in ("help", "__help", "_h")
    with import_module("cluster.processes").quiet_pipe():
        print(
            usage() if asked else f"error: unknown command '{name}'.\n{usage()}",
            file=sys.stdout if asked else sys.stderr,
        )
    sys.exit(0 if asked else 2)


def usage() -> str:
    """What there is, a line for each command, from its module's first line."""
    lines = ["usage: bcm COMMAND [options]; bcm COMMAND --help lists the options.\n"]
    for name in COMMANDS:
        docstring = ast.get_docstring(ast.parse((HOME / "pipelines" / f"{name}.py").read_text())) or ""
        lines.append(f"  {name:15s} {docstring.splitlines()[0].partition(': ')[2]}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
