"""What a user can mend: every error that a command prints as one message."""

import difflib
from collections.abc import Sequence

from bcm.types import BCMError
from cluster.errors import ClusterError
from data.errors import DataError


class ConfigError(ValueError):
    """A wrong option, recipe or run; the message names it and the remedy."""


class TrackingError(Exception):
    """MLflow cannot be used; the message names the URI, what is wrong and the remedy, and holds no password."""


USER_ERRORS = (BCMError, ClusterError, ConfigError, DataError, TrackingError)
"""What a command reports as one message; anything else is a bug and keeps its traceback."""


def nearest(name: str, known: Sequence[str]) -> str:
    """A hint for a misspelt name: the nearest known one, and all of them."""
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return (f"did you mean '{close[0]}'? " if close else "") + f"Known: {', '.join(known)}."
