"""Trying again what a storage did not do: within a deadline, after growing and jittered pauses, counted by cause."""

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from itertools import count
from typing import TypeVar

from data.errors import DataError
from data.store.failures import cause, failure, is_lasting

T = TypeVar("T")

_FIRST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0

_counts: Counter[str] = Counter()
_lock = threading.Lock()


def retried(action: str, url: str, call: Callable[[], T], until: float) -> T:
    """The result of `call`, which is tried again until a moment of the monotonic clock.

    What trying again cannot mend (no such file, no permission), and the last failure before the deadline, leave as a
    DataError "cannot {action} {url}: ...".
    """
    for attempt in count(1):
        try:
            return call()
        except DataError:
            raise
        except Exception as error:
            pause = min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0)
            if is_lasting(error) or time.monotonic() + pause > until:
                raise failure(action, url, error, attempt) from error
            note(cause(error))
            time.sleep(pause)
    raise AssertionError("the loop above returns or raises")


def note(reason: str) -> None:
    """Counts one more try for this reason."""
    with _lock:
        _counts[reason] += 1


def counts() -> dict[str, int]:
    """How often this process has tried again since it began, by cause; the most frequent first."""
    with _lock:
        return dict(_counts.most_common())


def report(counts: Mapping[str, int]) -> str:
    """One line for people, such as "storage was asked again 5 times: 3 x status 503, 2 x connection broken off"."""
    causes = ", ".join(f"{times} x {reason}" for reason, times in counts.items())
    return f"storage was asked again {sum(counts.values())} times{': ' * bool(causes)}{causes}"
