"""The command line of every command: options, help, exit codes. The only user of tyro."""

import os
import re
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, TypeVar

import tyro
from tqdm import tqdm

from cluster import processes, session
from data import store
from data.cache import CACHE_VARIABLE
from pipelines.config import Config
from pipelines.errors import USER_ERRORS, ConfigError

T = TypeVar("T")

_LINE_SECONDS = 10.0

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")]
"""An argument that is given without an option's name: what to call a thing."""
File = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="FILE")]
Url = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="URL")]
Recipe = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
Run = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Model = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="MODEL")]

AT_TOP_LEVEL = tyro.conf.arg(name="")
"""Annotates options whose parts stand at the top level of a command line: --train.seed, not --config.train.seed."""

ConfigOptions = Annotated[Config, AT_TOP_LEVEL]
"""A `Config` whose options stand at the top level of a command line."""


def run_command(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Run a command line; a user error becomes one message and exit code 2, Ctrl-C and SIGTERM exit code 130."""

    def interrupt(signum: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    if CACHE_VARIABLE in os.environ:  # Ray's workers are in another directory
        os.environ[CACHE_VARIABLE] = str(Path(os.environ[CACHE_VARIABLE]).expanduser().absolute())
    with processes.quiet_pipe():
        try:
            main(sys.argv[1:])
        except USER_ERRORS as error:
            print(f"error: {typable(str(error))}", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("stopped.", file=sys.stderr)
            sys.exit(130)
    sys.exit(0)


def words(module: str, *arguments: str) -> list[str]:
    """Runs a module as this program runs: by the script `bcm`, if it is a command and this one too, else by Python."""
    python = "python" if session.in_job() else sys.executable  # a job's files are gone when its output is read
    name = module.removeprefix("pipelines.")
    by_script = Path(sys.argv[0]).name == "bcm" and name != module
    return [*((sys.argv[0], name) if by_script else (python, "-m", module)), *arguments]


def command_line(module: str, *arguments: str) -> str:
    """`words` as they can be typed in this folder, with nothing activated."""
    first, *rest = words(module, *arguments)
    program, here = Path(first), Path.cwd()
    if shutil.which(program.name) == first:
        first = program.name
    elif program.is_relative_to(here):
        first = f"./{program.relative_to(here)}" if program.parent == here else str(program.relative_to(here))
    return shlex.join([first, *rest])


def typable(text: str) -> str:
    """`text` with each of our commands in it, `python -m pipelines.NAME`, as it can be typed."""
    return re.sub(r"python -m (pipelines\.\w+)", lambda found: command_line(found[1]), text)


_MARKERS = (tyro.conf.AvoidSubcommands,)
"""The recipe decides which kind of network it is."""


def durable(url: str, option: str) -> str:
    """`url` made absolute; in a job, a path relative to its working directory, which is thrown away, is refused."""
    if session.in_job() and store.is_local(url) and not Path(url.removeprefix("file://")).is_absolute():
        raise ConfigError(
            f"{option} {url} lies in the job's working directory, which is thrown away. "
            "Give a URL, such as s3://BUCKET/PATH, or an absolute path that all nodes share."
        )
    return store.absolute(url)


def parse(kind: type[T], argv: Sequence[str], module: str, default: T | None = None) -> T:
    """Parse a command's options; `--help` and mistakes are answered here, with exit code 0 and 2."""
    prog = command_line(*f"pipelines.{module}".split())
    if default is None:
        return tyro.cli(kind, args=list(argv), prog=prog, config=_MARKERS)
    return tyro.cli(kind, args=list(argv), prog=prog, default=default, config=_MARKERS)


def parse_one_of(kinds: Mapping[str, type[T]], argv: Sequence[str], module: str) -> T:
    """Parse the options of the sub-command that is named first; without any, help is printed."""
    args = list(argv) or ["--help"]
    return tyro.extras.subcommand_cli_from_dict(dict(kinds), prog=command_line(f"pipelines.{module}"), args=args)


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Announce a stage and say how long it took."""
    print(f"\n== {title}", flush=True)
    start = time.perf_counter()
    yield
    print(f"   {time.perf_counter() - start:.0f} s", flush=True)


class Bar:
    """A progress bar on a terminal; elsewhere a line now and then."""

    def __init__(self, unit: str) -> None:
        """Draws nothing until something is done."""
        self._unit = unit
        self._bars: dict[str, tqdm[Any]] = {}
        self._told = 0.0

    def __call__(self, title: str, done: int, total: int) -> None:
        """`done` of `total` are done."""
        if sys.stderr.isatty():
            if title not in self._bars:
                self._bars[title] = tqdm(desc=title, total=total, unit=self._unit, position=len(self._bars))
            self._bars[title].update(done - self._bars[title].n)
        elif done == total or time.monotonic() > self._told + _LINE_SECONDS:
            self._told = time.monotonic()
            print(f"{title} {done}/{total}", flush=True)

    def close(self) -> None:
        """Leaves the cursor below the bars."""
        for bar in self._bars.values():
            bar.close()
