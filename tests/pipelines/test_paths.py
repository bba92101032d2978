"""A path is a path: every kind of place takes every kind of path, and nothing appears at another."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from world import NAME, Command, World

from data import store
from data.cache import CACHE_VARIABLE
from pipelines.models.run import read_run
from pipelines.recipes import recipe
from pipelines.tracking import client as tracking
from pipelines.train import TrainOptions, check

KINDS: dict[str, tuple[str, Callable[[Path], str]]] = {
    "blank": ("a b", str),
    "percent": ("a%20b", str),
    "number sign": ("a#b", str),
    "question mark": ("a?b", str),
    "unicode": ("ä→ß", str),
    "brackets": ("[a]*", str),
    "colons": ("a::b", str),
    "trailing slash": ("ab", lambda path: f"{path}/"),
    "relative": ("a b", lambda path: os.path.relpath(path)),
    "file URL": ("ab", lambda path: f"file://{path}"),
    "file URL, escaped": ("a b%20#é", lambda path: path.as_uri()),
    "file URL with a slash": ("a b", lambda path: f"{path.as_uri()}/"),
}
"""By kind: the name of a folder, and how its path is written."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def place(world: World, kind: str) -> Path:
    """A folder of that kind, not yet there; whatever else appears beside it was nobody's wish."""
    return world.root / "places" / KINDS[kind][0] / "inner"


def written(place: Path, kind: str) -> str:
    return KINDS[kind][1](place)


def only(place: Path) -> bool:
    return [path.name for path in place.parent.parent.iterdir()] == [place.parent.name]


def test_a_data_set_is_written_and_verified(command: Command, place: Path, kind: str):
    assert command("prepare", "digits", "--to", written(place, kind)).code == 0
    assert command("prepare", "verify", written(place, kind)).code == 0
    assert (place / "manifest.json").is_file() and only(place)


def test_a_run_is_sampled_from_its_checkpoint_data_and_cache(
    command: Command, world: World, monkeypatch: pytest.MonkeyPatch, place: Path, kind: str
):
    shutil.move(world.runs, place)
    shutil.move(world.data, place / "data")
    monkeypatch.setenv(CACHE_VARIABLE, str(place / "cache"))
    run, data, out = (written(place / name, kind) for name in (NAME, "data", "pictures"))
    line = ("--task", "invert", "--count", "2", "--data", data, "--out", f"{out.rstrip('/')}/x.png")
    outcome = command("sample", run, *line)
    assert outcome.code == 0, outcome.err
    assert (place / "pictures" / "x.png").is_file() and (place / "cache").is_dir() and only(place)


@pytest.mark.parametrize("by", ["name", "url"])
def test_a_run_is_resumed_by_its_name_or_by_the_url_that_training_printed(
    world: World, place: Path, kind: str, by: str
):
    shutil.move(world.runs, place)
    run = read_run(str(place / NAME))
    options = TrainOptions(
        config=recipe("digits", smoke=True), data=str(world.data), resume=written(place / NAME, kind)
    )
    if by == "name":
        options = replace(options, resume=NAME, storage=written(place, kind))
    training = check(options)
    assert training.resumed and training.resumed.mlflow_run == run.mlflow_run
    assert (training.storage, training.resumed.url) == (str(place), str(place / NAME)) and only(place)


@pytest.mark.slow
def test_a_store_keeps_runs_and_models_and_gives_them_back(
    command: Command, world: World, monkeypatch: pytest.MonkeyPatch
):
    """The local store of a folder that is called so, without a setting."""
    place = world.root / "a b%20#é?"
    place.mkdir()
    monkeypatch.chdir(place)
    monkeypatch.delenv(tracking.URI_VARIABLE)
    uri = tracking.resolve_uri("runs")
    run_id = tracking.start_run(uri, experiment="bcm", name="x", params={}, tags={})
    tracking.log_json(uri, run_id, "a/b.json", [1])
    assert list((place / "runs" / "artifacts").rglob("b.json"))
    record = world.run / "run.json"
    record.write_text(record.read_text().replace(read_run(str(world.run)).mlflow_run, run_id))
    assert command("evaluate", str(world.run), "--samples", "10", "--images", "10").code == 0
    assert command("register", str(world.run), "--name", "m").code == 0
    outcome = command("sample", "models:/m@champion", "--count", "2")
    assert outcome.code == 0, outcome.err
    assert {path.parent for path in world.root.rglob("mlflow.db")} == {world.root, place / "runs"}


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("file:///a%20b/c", "/a b/c"),
        ("file://localhost/a", "/a"),
        ("/a%20b", "/a%20b"),
        ("/a b/", "/a b"),
        ("s3://bucket/a%20b/", "s3://bucket/a%20b"),
        ("s3://bucket", "s3://bucket"),
    ],
)
def test_what_a_url_means(url: str, path: str):
    assert store.absolute(url) == path
    assert store.join(url, "x%20y") == f"{path}/x%20y"
