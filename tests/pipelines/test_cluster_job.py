"""The whole job as on a real cluster: two raylets, an S3 server, an MLflow server, and `ray job submit`."""

import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
from mlflow import MlflowClient
from servers import mlflow_server, s3_server

from cluster.local import local_cluster
from pipelines.tracking import registry

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
STORAGE, DATA = "s3://runs/here", "s3://data/digits"


@dataclass(frozen=True)
class Site:
    """What a user's cluster offers."""

    jobs: str
    mlflow: str
    env: Mapping[str, str]
    buckets: Path
    database: Path
    ray: Path

    def submit(self, *command: str) -> str:
        """`ray job submit --working-dir . -- python -m ...` as a user types it; what it printed."""
        submit = [str(BIN / "ray"), "job", "submit", "--address", self.jobs, "--working-dir", ".", "--", "python", "-m"]
        done = subprocess.run([*submit, *command], cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
        return done.stdout


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    root = tmp_path_factory.mktemp("site")
    buckets, database = root / "buckets", root / "mlflow"
    for folder in (buckets / "runs", buckets / "data", buckets / "mlflow", database):
        folder.mkdir(parents=True)
    with s3_server(buckets) as s3, mlflow_server(database, "s3://mlflow/artifacts", s3.env) as tracking:
        env = {**s3.env, "MLFLOW_TRACKING_URI": tracking, "BCM_CACHE_DIR": str(root / "cache")}
        with local_cluster(nodes=2, cpus=1, env=env) as cluster:
            yield Site(cluster.job_address, tracking, env, buckets, database, cluster.folder)


def test_a_submitted_job_trains_over_s3_and_its_model_serves(site: Site, monkeypatch: pytest.MonkeyPatch):
    site.submit("pipelines.prepare", "digits", "--to", DATA)
    steps = ["--train.iterations", "20", "--checkpoint-every", "10", "--log-every", "5"]
    site.submit("pipelines.train", "digits", "--storage", STORAGE, "--data", DATA, *steps)

    (run,) = (path.parent for path in (site.buckets / "runs" / "here").glob("*/run.json"))
    assert sorted(path.parent.name for path in run.glob("*/checkpoint.json")) == [
        "checkpoint_000000010",
        "checkpoint_000000020",
    ]
    client = MlflowClient(site.mlflow)
    (found,) = client.search_runs([client.get_experiment_by_name("bcm").experiment_id])  # type: ignore[union-attr]
    assert found.info.status == "FINISHED"
    history = client.get_metric_history(found.info.run_id, "loss_ct")
    assert [metric.step for metric in history] == [5, 10, 15, 20]

    site.submit("pipelines.evaluate", f"{STORAGE}/{run.name}", "--samples", "250")
    site.submit("pipelines.register", f"{STORAGE}/{run.name}")
    assert client.get_model_version_by_alias("bcm-digits", "champion").version == "1"
    assert list((site.buckets / "mlflow").rglob("*.safetensors")), "the registered weights are not on the object store"

    for name, value in site.env.items():
        monkeypatch.setenv(name, value)
    toolkit = registry.toolkit_of(site.mlflow, "models:/bcm-digits@champion")
    assert toolkit.k == 20 and toolkit.schedules
    secret = site.env["AWS_SECRET_ACCESS_KEY"].encode()
    places = [site.buckets, site.database, site.ray / "ray"]
    written = [path for place in places for path in place.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(written) > 50
    for path in written:
        assert secret not in path.read_bytes(), f"{path} holds a secret"
