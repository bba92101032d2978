"""Ray Train's own hooks. This module imports ray and is imported where a training is launched."""

from typing import Any

import ray.train

from bcm.types import BCMError
from cluster.options import user_error
from data.errors import DataError, StorageError
from pipelines.errors import ConfigError


class FinalErrors(ray.train.UserCallback):
    """Ends a training at once, with the worker's own error, where no restart can help.

    What Ray calls a failure of its controller, an exception in a callback, is the one that it does not try again. A
    storage that failed for the moment, and whatever else a worker may meet, is left to `scaling.max-failures`.
    """

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise the first error that is the user's to mend."""
        for rank in sorted(worker_exceptions):
            error = user_error(worker_exceptions[rank])
            if isinstance(error, (BCMError, ConfigError, DataError)) and not isinstance(error, StorageError):
                raise error
