"""Which errors of the workers end a training at once, and which are left to a restart."""

import pytest
from ray.exceptions import RayTaskError
from ray.train.v2.api.exceptions import WorkerGroupError

from bcm.types import BCMError
from data.errors import DataError, StorageError
from pipelines.errors import ConfigError
from pipelines.training.callbacks import FinalErrors

FINAL = [BCMError("a wrong value"), ConfigError("a wrong option"), DataError("a damaged shard")]
PASSING = [
    StorageError("no answer"),
    RuntimeError("connection closed by peer"),
    ValueError("a bug"),
    OSError("a broken pipe"),
    MemoryError(),
]


def named(error: object) -> str:
    return type(error).__name__


def after(*errors: Exception) -> None:
    """Tell the callback that worker 0, 1, ... raised these."""
    FinalErrors().after_exception(None, dict(enumerate(errors)))


def wrapped(error: Exception) -> Exception:
    """An error as it comes from another process, and from several workers."""
    return WorkerGroupError("", {0: RayTaskError("train_worker", "traceback", error)})


@pytest.mark.parametrize("error", FINAL, ids=named)
def test_what_the_user_must_mend_is_final_and_raised_as_it_is(error: Exception):
    for seen in (error, wrapped(error)):
        with pytest.raises(type(error)) as raised:
            after(seen)
        assert raised.value is error


@pytest.mark.parametrize("error", PASSING, ids=named)
def test_what_a_restart_may_mend_is_not_final(error: Exception):
    after(error)
    after(wrapped(error), error)


@pytest.mark.parametrize("passing", PASSING, ids=named)
def test_a_final_error_is_found_behind_those_of_other_workers(passing: Exception):
    for errors in ((passing, FINAL[2]), (FINAL[2], passing), (passing, passing, wrapped(FINAL[2]))):
        with pytest.raises(DataError) as raised:
            after(*errors)
        assert raised.value is FINAL[2]


def test_of_several_final_errors_that_of_the_lowest_rank_is_raised():
    with pytest.raises(ConfigError):
        FinalErrors().after_exception(None, {2: FINAL[0], 1: FINAL[1], 0: PASSING[0]})


def test_no_error_is_no_end():
    after()
