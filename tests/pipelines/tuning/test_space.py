"""The space of time steps: every point is valid, and the paper's schedules are points of it."""

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

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
from pipelines.tuning.space import EDGE, EPSILON_RANGE, decode, encode, space

KNOWN = PAPER_CIFAR10 | {"multistep": CONSISTENCY_CIFAR10["sample-2"]}
NAMES = [name for name, steps in KNOWN.items() if space(steps)]


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
    return name, {key: draw(st.floats(*limits)) for key, limits in space(KNOWN[name]).items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_first_trial_is_the_papers_schedule(name: str):
    steps = KNOWN[name]
    point = encode(steps)
    assert all(low < point[key] < high for key, (low, high) in space(steps).items())
    assert numbers(decode(steps, point)) == pytest.approx(numbers(steps), rel=1e-9)


@given(points())
def test_every_point_is_a_valid_schedule_of_the_same_form(named: tuple[str, dict[str, float]]):
    name, point = named
    paper = KNOWN[name]
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
    assert encode(decode(KNOWN[name], point)) == pytest.approx(point, abs=1e-9)


def test_schedules_outside_the_space_become_its_nearest_edge():
    assert encode(Inversion(times=(0.002, 80.0)))["epsilon"] == EDGE
    assert encode(Inversion(times=(2.0, 80.0)))["epsilon"] == 1 - EDGE


def test_multistep_sampling_has_its_mid_times_to_search():
    assert list(space(Multistep(times=(0.5, 3.0, 80.0)))) == ["time_1", "time_2"]


def test_one_step_sampling_leaves_nothing_to_search():
    assert space(PAPER_CIFAR10["sample-1"]) == {}
