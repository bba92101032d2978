"""Speed, waiting and the time left, by a clock that the test turns."""

import time

import pytest

from pipelines.training.progress import Meter, Progress


class Clock:
    """Stands still unless told."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    fake = Clock()
    monkeypatch.setattr(time, "perf_counter", fake)
    return fake


def test_speed_and_waiting_since_the_start(clock: Clock):
    meter = Meter()
    for _ in range(5):
        meter.add(64, waited=0.1)
    clock.now += 2
    assert meter.measure() == pytest.approx((160, 0.25))
    clock.now += 2
    assert meter.measure() == pytest.approx((80, 0.125))


def test_only_the_last_points_count(clock: Clock):
    meter = Meter(points=2)
    meter.add(10_000, waited=5)
    clock.now += 10
    meter.measure()
    measured: list[tuple[float, float]] = []
    for _ in range(2):
        meter.add(100, waited=0.25)
        clock.now += 1
        measured.append(meter.measure())
    assert measured[-1] == pytest.approx((100, 0.25))


def test_no_time_passed_is_no_division_by_zero(clock: Clock):
    assert Meter().measure() == (0, 0)


@pytest.mark.parametrize(
    ("step", "speed", "left"),
    [(0, 640, "10:00"), (5400, 640, "1:00"), (5999, 64, "0:01"), (6000, 640, "0:00"), (3000, 1280, "2:30")],
)
def test_the_line_says_where_training_is_and_how_long_it_takes(step: int, speed: float, left: str):
    progress = Progress(step, 6000, 41, {"ct": 1.23456, "st": 0.5}, speed, 0.0314)
    assert progress.line(64) == (
        f"step {step}/6000  N 41  ct 1.235  st 0.500  {speed} images/s  data wait 3.1 %  left {left}"
    )


def test_a_line_before_any_speed_is_known_is_no_error():
    assert Progress(1, 100, 11, {"ct": 1}, 0, 0).line(64).startswith("step 1/100")


def test_the_line_shows_the_terms_of_the_objective_alone():
    assert Progress(1, 100, 0, {"edm": 2.5}, 10, 0).line(64).startswith("step 1/100  edm 2.500  10 images/s")
