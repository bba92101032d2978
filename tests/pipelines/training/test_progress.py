"""Speed, waiting and the time left, by a clock that the test turns; the lines on their way to the driver."""

import time
from typing import Any

import pytest
import ray
import torch

from bcm.training import TrainConfig
from data.loader import Batch
from pipelines.training import progress
from pipelines.training.progress import Meter, line_queue, progress_line, shown

CONFIG = TrainConfig(iterations=6000, batch_size=64)


def watch(meter: Meter, count: int, waited: float) -> None:
    """Let so many batches pass, each waited for so long."""
    none = torch.empty(0)
    batch = Batch(ids=none, images=none, labels=none, positions=none, wait=waited)
    assert list(meter.watched([batch] * count)) == [batch] * count


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
    meter = Meter(64)
    watch(meter, 5, waited=0.1)
    clock.now += 2
    assert meter.measure() == pytest.approx((160, 0.25))
    clock.now += 2
    assert meter.measure() == pytest.approx((80, 0.125))


def test_only_the_last_points_count(clock: Clock):
    meter = Meter(100, points=2)
    watch(meter, 100, waited=0.05)
    clock.now += 10
    meter.measure()
    measured: list[tuple[float, float]] = []
    for _ in range(2):
        watch(meter, 1, waited=0.25)
        clock.now += 1
        measured.append(meter.measure())
    assert measured[-1] == pytest.approx((100, 0.25))


def test_no_time_passed_is_no_division_by_zero(clock: Clock):
    assert Meter(64).measure() == (0, 0)


@pytest.mark.parametrize(
    ("step", "speed", "left"),
    [(0, 640, "10:00"), (5400, 640, "1:00"), (5999, 64, "0:01"), (6000, 640, "0:00"), (3000, 1280, "2:30")],
)
def test_the_line_says_where_training_is_and_how_long_it_takes(step: int, speed: float, left: str):
    line = progress_line(step, CONFIG, 41, {"ct": 1.23456, "st": 0.5}, speed, 0.0314)
    assert line == (f"step {step}/6000  N 41  ct 1.235  st 0.500  {speed} images/s  data wait 3.1 %  left {left}")


def test_a_line_before_any_speed_is_known_is_no_error():
    assert progress_line(1, CONFIG, 11, {"ct": 1}, 0, 0).startswith("step 1/6000")


def test_the_line_shows_the_terms_of_the_objective_alone():
    line = progress_line(1, CONFIG, 0, {"edm": 2.5}, 10, 0)
    assert line.startswith("step 1/6000  edm 2.500  10 images/s")


@pytest.mark.slow
def test_the_newest_line_of_a_worker_is_printed_and_no_line_is_no_error(
    ray_session: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def work(lines: Any) -> None:
        for k in (1, 2, 3):
            lines.put_nowait(f"step {k}")

    monkeypatch.setattr(progress, "LOG_SECONDS", 0.2)
    lines = line_queue()
    ray.get(ray.remote(num_cpus=0)(work).remote(lines))
    with shown(lines):
        time.sleep(1)
        assert capsys.readouterr().out == "step 3\n"
        lines.shutdown(force=True)
        time.sleep(1)
    assert capsys.readouterr().out == ""
