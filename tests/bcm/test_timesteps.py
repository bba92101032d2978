import json
from typing import Any

import pytest

from bcm import strict
from bcm.timesteps import (
    CONSISTENCY_CIFAR10,
    CONSISTENCY_IMAGENET64,
    PAPER_CIFAR10,
    PAPER_CIFAR10_DEEP,
    PAPER_IMAGENET64,
    PUBLISHED,
    Ancestral,
    Combined,
    Inversion,
    Multistep,
    TimeSteps,
    Zigzag,
)
from bcm.types import BCMError

STEPS: Any = TimeSteps


@pytest.mark.parametrize(("name", "steps"), [item for schedules in PUBLISHED.values() for item in schedules.items()])
def test_json_round_trip_and_nfe(name: str, steps: TimeSteps):
    assert strict.read(STEPS, json.dumps(strict.dump(steps)), "steps", complete=True) == steps
    assert steps.nfe == int(name.split("-")[1])


def test_the_published_tables_stand_under_their_names():
    assert PUBLISHED == {
        "cifar10": PAPER_CIFAR10,
        "cifar10-deep": PAPER_CIFAR10_DEEP,
        "imagenet64": PAPER_IMAGENET64,
        "ct-cifar10": CONSISTENCY_CIFAR10,
        "ct-imagenet64": CONSISTENCY_IMAGENET64,
    }


@pytest.mark.parametrize(("mid", "nfe"), [((), 1), ((0.821,), 2), ((0.1, 0.821, 5.0), 4)])
def test_multistep_costs_one_call_more_than_it_has_mid_times(mid: tuple[float, ...], nfe: int):
    steps = Multistep(times=(*mid, 80.0))
    assert steps.nfe == nfe
    assert strict.read(STEPS, json.dumps(strict.dump(steps)), "steps", complete=True) == steps


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Ancestral(times=(0.002, 80.0, 1.2)), "1.2 after 80.0"),
        (lambda: Ancestral(times=(0.002,)), "at least 2"),
        (lambda: Ancestral(times=(0.001, 80.0)), "range"),
        (lambda: Inversion(times=(0.07, 200.0)), "range"),
        (lambda: Inversion(times=(0.07, float("nan"))), "out of order"),
        (lambda: Zigzag(times=(0.8, 80.0), noise_scales=(0.9,)), "noise scale 0.9"),
        (lambda: Zigzag(times=(0.8, 80.0), noise_scales=()), "need 1 noise scales"),
        (lambda: Multistep(times=(80.0, 0.821)), "0.821 after 80.0"),
        (lambda: Multistep(times=()), "at least 2"),
        (lambda: Multistep(times=(0.002, 80.0)), "0.002 after 0.002"),
        (lambda: Multistep(times=(0.821, 90.0)), "range"),
        (lambda: Combined(times=(0.2, 80.0), zigzag_times=(0.3,), noise_scales=(0.1,)), "0.2 after 0.3"),
    ],
)
def test_wrong_time_steps_name_the_time(make, named: str):
    with pytest.raises(BCMError, match=named):
        make()


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({}, "missing key 'kind'"),
        ({"kind": "zagzig", "times": [1]}, "kind: .*'zagzig'"),
        ({"kind": "inversion"}, "missing key '.*times'"),
        ({"kind": "inversion", "times": [0.1, 1], "x": 1}, "unknown key '.*x'"),
        ({"kind": "zigzag", "times": [0.8, 80.0]}, "missing key '.*noise_scales'"),
        ({"kind": "inversion", "times": "0.07"}, "times: input should be"),
    ],
)
def test_wrong_json_is_refused(entry: dict, said: str):
    with pytest.raises(BCMError, match=said):
        strict.read(STEPS, json.dumps(entry), "steps")
