"""The space of time steps: every point is valid, and the paper's schedules are points of it."""

import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bcm import inference
from bcm.inference import Toolkit
from bcm.metrics import Moments, frechet_distance, mse
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.timesteps import (
    CONSISTENCY_CIFAR10,
    PAPER_CIFAR10,
    Ancestral,
    Combined,
    Inversion,
    Multistep,
    TimeSteps,
    Zigzag,
)
from bcm.types import BCMError
from pipelines.errors import ConfigError
from pipelines.tune import TuneOptions, targets_of
from pipelines.tuning.trials import EDGE, EPSILON_RANGE, Trials, decode, encode, score, space

PUBLISHED = PAPER_CIFAR10 | {"multistep": CONSISTENCY_CIFAR10["sample-2"]}
NAMES = [name for name, steps in PUBLISHED.items() if space(steps)]
NETWORK = NCSNppConfig(image_channels=1, resolution=8, width=8, channel_mult=(1,), blocks=1, attention=(), dropout=0.0)


def numbers(steps: TimeSteps) -> list[float]:
    """Every number of the time steps, those of Algorithm 3 and 4 after the times."""
    match steps:
        case Ancestral() | Inversion() | Multistep():
            return [*steps.times]
        case Zigzag():
            return [*steps.times, *steps.noise_scales]
        case Combined():
            return [*steps.zigzag_times, *steps.times, *steps.noise_scales]


@st.composite
def points(draw: st.DrawFn) -> tuple[str, dict[str, float]]:
    """A schedule's name and a point of its space, edges included."""
    name = draw(st.sampled_from(NAMES))
    return name, {key: draw(st.floats(*limits)) for key, limits in space(PUBLISHED[name]).items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_trial_is_the_papers_schedule(name: str):
    steps = PUBLISHED[name]
    point = encode(steps)
    assert all(low < point[key] < high for key, (low, high) in space(steps).items())
    assert numbers(decode(steps, point)) == pytest.approx(numbers(steps), rel=1e-9)


@given(points())
def test_every_point_is_a_valid_schedule_of_the_same_form(named: tuple[str, dict[str, float]]):
    name, point = named
    paper = PUBLISHED[name]
    steps = decode(paper, point)
    assert type(steps) is type(paper) and steps.nfe == paper.nfe
    match steps:
        case Ancestral() | Inversion() | Multistep() | Zigzag():
            times = steps.times
        case Combined():
            times = (*steps.zigzag_times, *steps.times)
    # No two times closer than EDGE of the log range that was left, so that no step is wasted.
    assert all(math.log(b / a) > 1e-5 for a, b in pairwise(times))
    if isinstance(steps, Inversion):
        assert EPSILON_RANGE[0] < steps.times[0] < EPSILON_RANGE[1]


@given(points())
def test_encoding_undoes_decoding(named: tuple[str, dict[str, float]]):
    name, point = named
    assert encode(decode(PUBLISHED[name], point)) == pytest.approx(point, abs=1e-9)


def test_schedules_outside_the_space_become_its_nearest_edge():
    assert encode(Inversion(times=(0.002, 80.0)))["epsilon"] == EDGE
    assert encode(Inversion(times=(2.0, 80.0)))["epsilon"] == 1 - EDGE


def test_multistep_sampling_has_its_mid_times_to_search():
    assert list(space(Multistep(times=(0.5, 3.0, 80.0)))) == ["time_1", "time_2"]


def test_one_step_sampling_leaves_nothing_to_search():
    assert space(PAPER_CIFAR10["sample-1"]) == {}


@pytest.fixture(scope="module")
def toolkit() -> Toolkit:
    torch.manual_seed(0)
    model = BCM(build_network(NETWORK))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return Toolkit(model=model.eval().requires_grad_(False), network=NETWORK, k=0, schedules={})


@pytest.fixture(scope="module")
def trials(toolkit: Toolkit) -> Trials:
    x = torch.rand(30, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return Trials(toolkit=toolkit, train=Moments.of((x + 1) / 2), x=x, labels=tuple(range(30)), samples=30)


@pytest.mark.parametrize("name", ["sample-1", "sample-2", "sample-3", "invert-2"])
def test_a_score_depends_on_its_seeds_and_time_steps_alone(trials: Trials, name: str):
    steps = PAPER_CIFAR10[name]
    assert score(trials, steps, 5) == score(trials, steps, 5)
    assert score(trials, steps, 5) != score(trials, steps, 6)


def test_scores_are_frechet_distances_and_errors(trials: Trials):
    """Against the formulas, on other batches."""
    steps = PAPER_CIFAR10["sample-3"]
    assert isinstance(steps, Zigzag)
    with_steps = Toolkit(model=trials.toolkit.model, network=NETWORK, k=0, schedules={"sample-3": steps})
    made = torch.cat([inference.generate(with_steps, range(start, start + 10), 3) for start in (7, 17, 27)])
    expected = frechet_distance(Moments.of((made.clamp(-1, 1) + 1) / 2), trials.train)
    assert score(trials, steps, 7) == pytest.approx(expected, rel=1e-5)

    inversion = PAPER_CIFAR10["invert-2"]
    with_steps = Toolkit(model=trials.toolkit.model, network=NETWORK, k=0, schedules={"invert-2": inversion})
    parts = [(trials.x[i : i + 10], range(7 + i, 17 + i)) for i in (0, 10, 20)]
    errors = [mse(inference.reconstruct(with_steps, x, seeds, 2), x) for x, seeds in parts]
    assert score(trials, inversion, 7) == pytest.approx(float(torch.cat(errors).mean()), rel=1e-5)


def test_a_model_that_gives_no_finite_images_scores_no_finite_number(trials: Trials):
    broken = BCM(build_network(NETWORK)).eval().requires_grad_(False)
    next(broken.parameters()).fill_(math.nan)
    toolkit = Toolkit(model=broken, network=NETWORK, k=0, schedules={})
    shared = Trials(toolkit=toolkit, train=trials.train, x=trials.x, labels=trials.labels, samples=10)
    assert score(shared, PAPER_CIFAR10["sample-2"], 0) == math.inf
    assert not math.isfinite(score(shared, PAPER_CIFAR10["invert-1"], 0))


@pytest.fixture(scope="module")
def ict() -> Toolkit:
    network = replace(NETWORK, times=1)
    model = BCM(build_network(network)).eval().requires_grad_(False)
    return Toolkit(model=model, network=network, k=0, schedules=CONSISTENCY_CIFAR10)


def test_by_default_what_the_model_has_is_searched(toolkit: Toolkit, ict: Toolkit):
    options = TuneOptions(model="run")
    assert targets_of(options, toolkit) == ("sample-2", "sample-3", "invert-2")
    assert targets_of(options, ict) == ("sample-2",)
    assert targets_of(TuneOptions(model="run", targets=("invert-1",)), toolkit) == ("invert-1",)


def test_targets_that_a_model_has_not_are_refused(ict: Toolkit):
    with pytest.raises(BCMError, match="no inverse direction"):
        targets_of(TuneOptions(model="run", targets=("sample-2", "invert-2")), ict)
    with pytest.raises(ConfigError, match="no target 'sample-4': did you mean 'sample-"):
        targets_of(TuneOptions(model="run", targets=("sample-4",)), ict)


def test_mid_times_are_scored_by_the_distance_of_their_samples(trials: Trials, ict: Toolkit):
    shared = replace(trials, toolkit=ict)
    scores = [score(shared, Multistep(times=(tau, 80.0)), 5) for tau in (0.821, 0.821, 10.0)]
    assert scores[0] == scores[1] != scores[2]
