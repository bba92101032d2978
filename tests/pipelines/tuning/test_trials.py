"""The score of a trial: that of its time steps and seeds alone, by the formulas."""

import math
from dataclasses import replace

import pytest
import torch

from bcm import inference
from bcm.inference import Toolkit
from bcm.metrics import Moments, frechet_distance, mse
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.timesteps import CONSISTENCY_CIFAR10, PAPER_CIFAR10, Multistep, Zigzag
from pipelines.tuning.trials import Trials, score

NETWORK = NCSNppConfig(image_channels=1, resolution=8, width=8, channel_mult=(1,), blocks=1, attention=(), dropout=0.0)


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


def test_mid_times_are_scored_by_the_distance_of_their_samples(trials: Trials, ict: Toolkit):
    shared = replace(trials, toolkit=ict)
    scores = [score(shared, Multistep(times=(tau, 80.0)), 5) for tau in (0.821, 0.821, 10.0)]
    assert scores[0] == scores[1] != scores[2]
