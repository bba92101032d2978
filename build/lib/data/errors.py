"""The one error class of this package."""


class DataError(Exception):
    """Bad data or storage that the user can mend: the message says what, where and what to do."""
