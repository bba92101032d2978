"""A training that is started again makes the same weights, whatever the number of workers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_workers_that_start_again_make_the_same_weights(workers: int, tmp_path: Path):
    script = Path(__file__).with_name("restarted_workers.py")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, str(script)]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(workers), str(tmp_path / "store")], stdout=subprocess.PIPE, env=environment
        )
        for rank in range(workers)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    for output in outputs:
        assert json.loads(output) == {"plain": 0, "accumulated": 0, "activations": 0}
