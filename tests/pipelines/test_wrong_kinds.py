"""Every JSON that is read refuses a value of the wrong kind, and says which key it was."""

import copy
import json
from collections.abc import Callable
from typing import Any

import pytest

from bcm import strict
from bcm.checkpoint import Index, read_index
from bcm.inference import dump_schedules, read_schedules
from bcm.timesteps import PAPER_CIFAR10
from bcm.types import BCMError
from data.errors import DataError
from data.manifest import Manifest, Shard, SplitManifest, parse_manifest
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.evaluation.scores import Score, Scores
from pipelines.models.run import Notes, Run
from pipelines.recipes import recipe
from pipelines.tracking.metriclog import Point

CONFIG = recipe("digits")
RUN = Run(
    name="r",
    storage="s",
    data="d",
    manifest_sha256="0",
    mlflow_run="m",
    code="c",
    config=CONFIG,
    schedules=PAPER_CIFAR10,
    init="",
    init_sha256="",
)
INDEX = Index(
    k=3,
    network=CONFIG.network,
    sigma_data=0.5,
    objective="bct",
    skipped=0,
    skipped_in_a_row=0,
    ema_rates=(0.9,),
    files={},
)
SCORE = Score(
    metric="fd-pixels",
    task="sample",
    nfe=3,
    value=0.5,
    error=None,
    count=10,
    seeds=(0, 9),
    extractor="pixels-3072",
    steps=PAPER_CIFAR10["sample-3"],
)
SCORES = Scores(k=3, ema_rate=None, schedules=PAPER_CIFAR10, rows=(SCORE,))
NOTES = Notes(run=RUN, images_seen=9, unsent=(Point(1, 2, {"loss": 0.5}),))
SHARD = Shard.of("train-000000.tar", 4096, "0" * 64, [1024, 2560], [121, 121])
MANIFEST = Manifest(
    name="m",
    resolution=6,
    channels=3,
    class_names=("a",),
    flip=True,
    splits={"train": SplitManifest(count=2, shards=(SHARD,))},
    root="s3://bucket/elsewhere",
)


def reader(kind: Any) -> Callable[[str], object]:
    return lambda text: strict.read(kind, text, "file", ConfigError, complete=True)


FILES: dict[str, tuple[Any, Callable[[str], object]]] = {
    "config": (strict.dump(CONFIG), reader(Config)),
    "run": (strict.dump(RUN), reader(Run)),
    "notes": (strict.dump(NOTES), reader(Notes)),
    "index": (strict.dump(INDEX), lambda text: read_index(text, "file")),
    "scores": (strict.dump(SCORES), reader(Scores)),
    "schedules": (dump_schedules(PAPER_CIFAR10), lambda text: read_schedules(text, "file")),
    "manifest": (json.loads(MANIFEST.to_json()), lambda text: parse_manifest(text, "file")),
}
WRONG: list[tuple[str, str, Any]] = [
    *(
        ("config", key, value)
        for key, value in {"recipe": 7, "dataset": None, "window": "2", "finetunes": "no"}.items()
    ),
    *(("config", key, value) for key, value in {"log_every": 1.5, "checkpoint_every": True, "time_steps": 3}.items()),
    *(("config", f"train.{key}", value) for key, value in {"compile": "no", "seed": 1.5, "iterations": True}.items()),
    *(("config", f"train.{key}", value) for key, value in {"batch_size": 128.5, "learning_rate": "1e-3"}.items()),
    *(("config", f"train.{key}", value) for key, value in {"ema_rates": 0.9, "objective": None}.items()),
    *(("config", f"scaling.{key}", value) for key, value in {"gpu": "false", "workers": "2"}.items()),
    *(("config", f"scaling.{key}", value) for key, value in {"cpus_per_worker": None, "max_failures": 1.5}.items()),
    *(("config", f"network.{key}", value) for key, value in {"times": 2.5, "width": "16", "dropout": "0"}.items()),
    *(("config", f"network.{key}", value) for key, value in {"channel_mult": 2, "channel_mult.0": "1"}.items()),
    *(("config", f"schedule.{key}", value) for key, value in {"s0": [], "pairs": 1, "curriculum_N": "41"}.items()),
    *(("run", key, value) for key, value in {"name": 1, "storage": None, "data": ["d"], "mlflow_run": 0}.items()),
    *(("run", key, value) for key, value in {"schedules": [], "schedules.sample-2.times": "80"}.items()),
    *(
        ("run", key, value)
        for key, value in {"code": {}, "init": False, "config": "x", "config.train.seed": "0"}.items()
    ),
    *(("notes", key, value) for key, value in {"images_seen": "9", "unsent": {}, "unsent.0.step": 1.5}.items()),
    *(("notes", key, value) for key, value in {"unsent.0.values": [], "unsent.0.time_ms": "2", "run.name": 3}.items()),
    *(("index", key, value) for key, value in {"k": "3", "sigma_data": "0.5", "objective": 4, "skipped": 0.5}.items()),
    *(("index", key, value) for key, value in {"ema_rates": [True], "files": [], "network.blocks": 1.5}.items()),
    *(("index", key, value) for key, value in {"format": "x", "version": "2", "network": []}.items()),
    *(("scores", key, value) for key, value in {"k": 1.5, "ema_rate": "0.9", "rows": {}, "schedules": []}.items()),
    *(("scores", f"rows.0.{key}", value) for key, value in {"metric": "fid?", "task": 1, "nfe": "3"}.items()),
    *(("scores", f"rows.0.{key}", value) for key, value in {"value": "good", "error": [], "count": 9.5}.items()),
    *(("scores", f"rows.0.{key}", value) for key, value in {"seeds": 3, "extractor": 5, "steps": "x"}.items()),
    *(("schedules", f"sample-3.{key}", value) for key, value in {"times": "0.8", "noise_scales": 0.2}.items()),
    *(("schedules", f"sample-3.{key}", value) for key, value in {"t_min": "0", "kind": "zagzig"}.items()),
    *(("schedules", key, value) for key, value in {"invert-1": 3, "sample-2.times.0": None}.items()),
    *(
        ("manifest", key, value)
        for key, value in {"name": 1, "resolution": "6", "channels": 3.5, "flip": "yes"}.items()
    ),
    *(("manifest", key, value) for key, value in {"class_names": "a", "root": 1, "version": "2", "splits": []}.items()),
    *(("manifest", f"splits.train.{key}", value) for key, value in {"count": "2", "shards": {}}.items()),
    *(("manifest", f"splits.train.shards.0.{key}", value) for key, value in {"path": 7, "bytes": 1.5}.items()),
    *(("manifest", f"splits.train.shards.0.{key}", value) for key, value in {"sha256": 0, "places": [1]}.items()),
]


def at(entry: Any, path: str) -> tuple[Any, Any]:
    """The object or list that holds the value at a path, and its key there."""
    *before, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    for part in before:
        entry = entry[part]
    return entry, last


def test_the_table_is_long_and_what_it_starts_from_is_right():
    assert len(WRONG) >= 60 and {file for file, _, _ in WRONG} == FILES.keys()
    for entry, read in FILES.values():
        read(json.dumps(entry))


@pytest.mark.parametrize(("file", "key", "value"), WRONG)
def test_a_value_of_the_wrong_kind_is_refused_with_its_key(file: str, key: str, value: Any):
    entry, read = FILES[file]
    entry = copy.deepcopy(entry)
    holder, last = at(entry, key)
    assert holder[last] != value
    holder[last] = value
    with pytest.raises((BCMError, ConfigError, DataError)) as raised:
        read(json.dumps(entry))
    assert key in str(raised.value)


@pytest.mark.parametrize(
    ("file", "key"),
    [("config", "window"), ("run", "init"), ("notes", "unsent"), ("index", "k"), ("scores", "rows.0.error")],
)
def test_a_missing_key_is_refused_even_where_there_is_a_default(file: str, key: str):
    entry, read = FILES[file]
    entry = copy.deepcopy(entry)
    holder, last = at(entry, key)
    del holder[last]
    with pytest.raises((BCMError, ConfigError, DataError), match=f"missing key '{key}'"):
        read(json.dumps(entry))
