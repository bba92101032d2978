"""The frames of ours between `python -m pipelines.train` and `bct_loss`.

python -m benchmarks.frames

A real training of the digits' smoke form, whose worker runs in this process (Ray Train's local mode); the stack is
taken when the loss is first computed.
"""

import os
import sys
import tempfile
import traceback
from dataclasses import replace
from pathlib import Path
from typing import Any

from bcm.objectives import OBJECTIVES
from cluster import options
from data.prepare import prepare
from pipelines import train
from pipelines.cli import run_command

ROOT = Path(__file__).resolve().parents[1]
OURS = ("bcm", "cluster", "data", "pipelines")


class ReachedError(Exception):
    """The loss was reached."""


def frames(folder: Path) -> list[str]:
    """File and function of each frame of ours, the command first."""
    stack: list[str] = []

    def loss(*arguments: Any) -> Any:
        for frame in traceback.extract_stack()[:-1]:
            path = Path(frame.filename)
            if path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in OURS:
                stack.append(f"{path.relative_to(ROOT)}: {frame.name}")
        raise ReachedError

    def local(_: object) -> Any:
        from ray.train import ScalingConfig

        return ScalingConfig(num_workers=0)

    OBJECTIVES["bct"] = replace(OBJECTIVES["bct"], loss=loss)
    options.scaling_config = local
    prepare("digits", None, str(folder / "data"), tell=lambda _: None)
    os.environ |= {"BCM_CACHE_DIR": str(folder / "cache"), "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    sys.argv = ["train", "digits", "--smoke", "--storage", str(folder / "runs"), "--data", str(folder / "data")]
    try:
        run_command(train.main)
    except ReachedError:
        return [*stack, "bcm/losses.py: bct_loss"]
    raise AssertionError("the loss was never computed")


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        found = frames(Path(name))
    print(f"{len(found)} frames from the command to the loss:")
    print("\n".join(f"  {line}" for line in found))


if __name__ == "__main__":
    main()
