"""The error classes of this package."""


class DataError(Exception):
    """Bad data or storage that the user can mend: the message says what, where and what to do."""


class StorageError(DataError):
    """A storage that did not do what it may do at another time: trying again later can help."""
