"""The files of one test of the commands, and how a command ended."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bcm import strict
from pipelines.evaluation.scores import Score, Scores
from pipelines.models import checkpoints
from pipelines.models.source import model_at

NAME = "digits-smoke-20260101-000000-abcd"
STEP = 40


@dataclass(frozen=True)
class World:
    """Folders of one test's own."""

    root: Path
    data: Path
    runs: Path
    run: Path
    checkpoint: Path
    mlflow: str

    @staticmethod
    def at(root: Path) -> World:
        """The places below `root`; nothing is made."""
        run = root / "runs" / NAME
        checkpoint = run / checkpoints.checkpoint_name(STEP)
        return World(root, root / "data", root / "runs", run, checkpoint, f"sqlite:///{root}/mlflow.db")


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The message of a command that refused, which must be all that it said on stderr."""
        assert self.code == 2, self
        assert self.err.startswith("error: ") and self.err.count("error: ") == 1, self.err
        assert "Traceback" not in self.out + self.err
        return self.err.removeprefix("error: ").rstrip("\n")


Command = Callable[..., Outcome]
Main = Callable[[Sequence[str]], None]


def edit_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a JSON file in place."""
    entry = json.loads(path.read_text())
    change(entry)
    path.write_text(json.dumps(entry))


def tree(folder: Path) -> set[str]:
    """The files of a folder."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def scores(world: World) -> dict[str, Any]:
    """What `evaluate` stores."""
    schedules = model_at(str(world.run)).schedules()
    row = Score(
        metric="mse",
        task="reconstruct",
        nfe=4,
        value=0.01,
        error=0.001,
        count=297,
        seeds=(0, 296),
        extractor=None,
        steps=schedules["invert-4"],
    )
    return strict.dump(Scores(k=STEP, ema_rate=None, schedules=schedules, rows=(row,)))
