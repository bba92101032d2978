"""The one error of this package."""


class ClusterError(Exception):
    """A cluster, a job or a cluster file is not as it must be; the message says what, where and what to do."""
