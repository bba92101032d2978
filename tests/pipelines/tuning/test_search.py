"""What is searched for a model, when a search ends, and what is kept of it."""

import json
from dataclasses import replace

import pytest
from world import NAME, Command, World

from bcm import strict
from bcm.inference import SCHEDULES, Toolkit
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.timesteps import CONSISTENCY_CIFAR10, PAPER_CIFAR10
from bcm.types import BCMError
from pipelines.errors import ConfigError
from pipelines.models.run import Run, read_run
from pipelines.recipes import recipe
from pipelines.tracking import client as tracking
from pipelines.tuning import search as searching
from pipelines.tuning.search import Outcome, load_trials, search, searchable, table, targets_of
from pipelines.tuning.trials import FRESH_SEEDS, score

NETWORK = NCSNppConfig(image_channels=1, resolution=8, width=8, channel_mult=(1,), blocks=1, attention=(), dropout=0.0)


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    return Toolkit(model=BCM(build_network(NETWORK)).eval(), network=NETWORK, k=0, schedules=PAPER_CIFAR10)


@pytest.fixture(scope="module")
def ict() -> Toolkit:
    network = replace(NETWORK, times=1)
    return Toolkit(model=BCM(build_network(network)).eval(), network=network, k=0, schedules=CONSISTENCY_CIFAR10)


@pytest.fixture
def run(world: World) -> Run:
    return read_run(str(world.run))


@pytest.fixture
def ict_run(run: Run) -> Run:
    return replace(run, config=recipe("digits-ict", smoke=True), schedules=CONSISTENCY_CIFAR10)


def test_by_default_what_the_model_has_is_searched(run: Run, ict_run: Run, toolkit: Toolkit, ict: Toolkit):
    assert targets_of(run, toolkit) == {name: PAPER_CIFAR10[name] for name in ("sample-2", "sample-3", "invert-2")}
    assert targets_of(ict_run, ict) == {"sample-2": CONSISTENCY_CIFAR10["sample-2"]}
    assert targets_of(run, toolkit, ("invert-1",)) == {"invert-1": PAPER_CIFAR10["invert-1"]}


def test_targets_that_a_model_has_not_are_refused(ict_run: Run, ict: Toolkit):
    with pytest.raises(BCMError, match="no inverse direction"):
        targets_of(ict_run, ict, ("sample-2", "invert-2"))
    with pytest.raises(ConfigError, match="no target 'sample-4': did you mean 'sample-"):
        targets_of(ict_run, ict, ("sample-4",))


def test_a_search_ends_its_time_after_its_first_result(monkeypatch: pytest.MonkeyPatch):
    """However long the workers took to start."""
    now = 100.0
    monkeypatch.setattr(searching.time, "monotonic", lambda: now)
    stopper = searching._out_of_time(5)
    now = 1000.0
    assert not stopper.stop_all()
    assert stopper("trial", {"score": 1.0}) is False
    now = 1004.0
    assert stopper("another", {"score": 1.0}) is False and not stopper.stop_all()
    now = 1005.5
    assert stopper.stop_all()


def test_the_table_shows_the_time_steps_that_are_kept():
    lines = table([Outcome("sample-3", 12, 0.5, 0.25, PAPER_CIFAR10["sample-3"])]).splitlines()
    assert lines[1].split() == ["sample-3", "12", "0.50000", "0.25000", "times", "0.8", "80", "noise_scales", "0.2"]


@pytest.mark.slow
def test_a_search_of_one_trial_tries_the_papers_schedule_and_keeps_it(world: World, command: Command):
    line = ("--targets", "sample-2", "--trials", "1", "--samples", "50", "--seed", "3")
    outcome = command("tune", str(world.run), *line)
    assert outcome.code == 0, outcome.err
    kept = json.loads((world.run / SCHEDULES).read_text())
    assert kept["sample-2"] == json.loads(json.dumps(strict.dump(PAPER_CIFAR10["sample-2"])))
    client = tracking.connect(world.mlflow)
    experiment = client.get_experiment_by_name("bcm-tune")
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert (logged.info.run_name, logged.info.status) == (f"tune-{NAME}", "FINISHED")
    paper, best = (logged.data.metrics[f"{kind}_sample-2"] for kind in ("paper", "best"))
    assert best == pytest.approx(paper, rel=1e-6) and len(logged.data.metrics) == 2
    assert outcome.out.splitlines()[1].startswith(f"sample-2        1  {paper:8.5f}  {best:8.5f}  times 0.002 1.2 80")
    stated = {name: logged.data.params[name] for name in ("model", "trials", "samples", "seed")}
    assert stated == {"model": str(world.run), "trials": "1", "samples": "50", "seed": "3"}
    assert logged.data.tags["mlflow.parentRunId"] == read_run(str(world.run)).mlflow_run


@pytest.mark.slow
def test_the_better_of_the_papers_and_the_best_trials_time_steps_is_kept(world: World, ray_session: None):
    run, toolkit, manifest = searchable(str(world.run))
    shared = load_trials(run, toolkit, manifest, 50)
    assert (shared.x.shape, len(shared.labels), shared.train.count) == ((50, 1, 8, 8), 50, 1500)
    targets = targets_of(run, toolkit, ("sample-2", "invert-2"))
    for outcome in search(run, shared, targets, seconds=60, trials=4, seed=3):
        of_paper = score(shared, targets[outcome.target], FRESH_SEEDS)
        assert (outcome.trials, outcome.paper) == (4, pytest.approx(of_paper, rel=1e-4))
        kept = score(shared, outcome.steps, FRESH_SEEDS)
        assert kept == pytest.approx(min(outcome.paper, outcome.best), rel=1e-4)
        assert outcome.best != outcome.paper
