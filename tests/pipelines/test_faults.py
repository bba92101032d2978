"""Processes are killed; training must not notice. Every run here is a real one on a private Ray."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipelines.models import checkpoints

pytestmark = pytest.mark.slow

ITERATIONS, CHECKPOINT, LOG = 120, 40, 10
TRAIN = [
    *("-m", "pipelines.train", "digits", "--smoke", "--storage", "runs", "--checkpoint-every", str(CHECKPOINT)),
    *("--train.iterations", str(ITERATIONS), "--log-every", str(LOG), "--train.batch-size", "24"),
]


def start(cwd: Path, workers: int, *options: str) -> subprocess.Popen[bytes]:
    log = (cwd / "log.txt").open("ab")
    command = [sys.executable, *TRAIN, "--scaling.workers", str(workers), "--scaling.cpus-per-worker", "0.5", *options]
    return subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log, env=environment(cwd))


def environment(cwd: Path) -> Mapping[str, str]:
    root = str(Path(__file__).resolve().parents[2])
    names = {name: value for name, value in os.environ.items() if name not in ("RAY_ADDRESS", "MLFLOW_TRACKING_URI")}
    return names | {"PYTHONPATH": root, "BCM_CACHE_DIR": str(cwd / "cache")}


def wait_for(condition: Callable[[], object], process: subprocess.Popen[bytes], cwd: Path) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < until, (cwd / "log.txt").read_text()[-3000:]
        assert process.poll() is None, (cwd / "log.txt").read_text()[-3000:]
        time.sleep(0.05)


def finish(process: subprocess.Popen[bytes], cwd: Path) -> Path:
    assert process.wait(timeout=400) == 0, (cwd / "log.txt").read_text()[-3000:]
    return only_run(cwd)


def only_run(cwd: Path) -> Path:
    (record,) = (cwd / "runs").glob("*/run.json")
    return record.parent


def has_checkpoint(cwd: Path, k: int) -> bool:
    return any((cwd / "runs").glob(f"*/{checkpoints.checkpoint_name(k)}/checkpoint.json"))


def final_weights(run: Path) -> dict[str, bytes]:
    folder = run / checkpoints.checkpoint_name(ITERATIONS)
    return {
        f"{name}:{key}": tensor.numpy().tobytes()
        for name in ("model", "ema", "optimizer")
        for key, tensor in load_file(folder / f"{name}.safetensors").items()
    }


def logged_steps(cwd: Path) -> list[int]:
    client = MlflowClient(f"sqlite:///{cwd / 'runs' / 'mlflow.db'}")
    record = json.loads((only_run(cwd) / "run.json").read_text())
    found = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert [run.info.run_id for run in found] == [record["mlflow_run"]]
    assert found[0].info.status == "FINISHED"
    return [metric.step for metric in client.get_metric_history(record["mlflow_run"], "loss_ct")]


def prepared(cwd: Path) -> Path:
    cwd.mkdir()
    command = [sys.executable, "-m", "pipelines.prepare", "digits"]
    subprocess.run(command, cwd=cwd, env=environment(cwd), check=True, capture_output=True)
    return cwd


def unbroken(cwd: Path, workers: int) -> dict[str, bytes]:
    run = finish(start(prepared(cwd), workers), cwd)
    assert logged_steps(cwd) == list(range(LOG, ITERATIONS + 1, LOG))
    return final_weights(run)


@pytest.mark.parametrize("count", [2, 4] if os.environ.get("BCM_FAULTS_ALL") else [4])
def test_a_killed_worker_changes_nothing(count: int, tmp_path: Path):
    expected = unbroken(tmp_path / "unbroken", count)
    cwd = prepared(tmp_path / "project")
    process = start(cwd, count)
    wait_for(lambda: has_checkpoint(cwd, CHECKPOINT), process, cwd)
    workers = [p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in p.name()]
    workers = workers or [
        p for p in psutil.Process(process.pid).children(recursive=True) if "RayTrainWorker" in " ".join(p.cmdline())
    ]
    assert len(workers) == count
    workers[0].kill()
    run = finish(process, cwd)
    assert final_weights(run) == expected
    assert logged_steps(cwd) == list(range(LOG, ITERATIONS + 1, LOG))


@pytest.mark.parametrize("count", [2, 3, 4] if os.environ.get("BCM_FAULTS_ALL") else [3])
def test_a_killed_driver_resumes_and_changes_nothing(count: int, tmp_path: Path):
    expected = unbroken(tmp_path / "unbroken", count)
    cwd = prepared(tmp_path / "project")
    process = start(cwd, count)
    wait_for(lambda: has_checkpoint(cwd, CHECKPOINT), process, cwd)
    processes = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(processes, timeout=15)
    for left in alive:
        left.kill()
    run = only_run(cwd)
    assert not (run / checkpoints.checkpoint_name(ITERATIONS)).exists()

    finish(start(cwd, count, "--resume", run.name), cwd)
    assert final_weights(run) == expected
    assert logged_steps(cwd) == list(range(LOG, ITERATIONS + 1, LOG))

    # A kill can cut or lose Ray's own record; the checkpoints then speak for themselves.
    (run / checkpoints.RAY_RECORD).write_text('{"ray_version": ')
    finish(start(cwd, count, "--resume", run.name), cwd)
    assert final_weights(run) == expected
    assert logged_steps(cwd) == list(range(LOG, ITERATIONS + 1, LOG))
