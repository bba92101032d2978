"""Tries are repeated up to a deadline, and counted by what made them necessary."""

import time
from collections.abc import Callable, Iterator, Sequence
from itertools import count

import pytest

from data.errors import DataError
from data.store import transfer


def failing(errors: Sequence[Exception]) -> Callable[[], str]:
    left: Iterator[Exception] = iter(errors)

    def call() -> str:
        for error in left:
            raise error
        return "done"

    return call


def test_what_passes_is_tried_again_and_counted() -> None:
    class ServerError(OSError):
        status = 503

    errors = [ServerError(), EOFError(), TimeoutError(), ConnectionResetError()]
    assert transfer.retried("read", "s3://b/x", failing(errors), 30) == "done"
    assert transfer.retries() == {
        "status 503": 1,
        "short answer": 1,
        "no answer in time": 1,
        "connection broken off": 1,
    }


@pytest.mark.parametrize("error", [FileNotFoundError("x"), PermissionError("x"), ValueError("x")])
def test_what_lasts_is_told_at_once(error: Exception) -> None:
    with pytest.raises(DataError, match=rf"cannot read s3://b/x: {type(error).__name__}: x\. "):
        transfer.retried("read", "s3://b/x", failing([error]), 30)
    assert transfer.retries() == {}


def test_a_refusal_lasts_unless_the_server_is_only_busy() -> None:
    class RefusedError(OSError):
        status = 400

    class BusyError(OSError):
        status = 429

    with pytest.raises(DataError, match="RefusedError"):
        transfer.retried("read", "s3://b/x", failing([RefusedError()]), 30)
    assert transfer.retried("read", "s3://b/x", failing([BusyError()]), 30) == "done"


def test_the_deadline_is_kept() -> None:
    began = time.monotonic()
    with pytest.raises(
        DataError, match=r"cannot read s3://b/x \(\d attempts\): ConnectionResetError: no details\. Check"
    ):
        transfer.retried("read", "s3://b/x", failing([ConnectionResetError() for _ in range(99)]), 1)
    assert time.monotonic() - began < 1.5


def test_pauses_grow_and_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    errors = [ConnectionResetError() for _ in range(12)]
    assert transfer.retried("read", "s3://b/x", failing(errors), 1000) == "done"
    bounds = [min(10.0, 0.2 * 2**number) for number, _ in zip(count(), pauses, strict=False)]
    assert all(bound / 2 <= pause <= bound for pause, bound in zip(pauses, bounds, strict=True))
    assert len({pause / bound for pause, bound in zip(pauses, bounds, strict=True)}) == 12


def test_a_call_that_does_not_answer_is_given_up() -> None:
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0 seconds"):
        transfer.within(0.1, lambda: time.sleep(5))
    assert time.monotonic() - began < 2
    assert transfer.within(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        transfer.within(5, lambda: 1 // 0)
