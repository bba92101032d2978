"""Turns what storage libraries raise into a DataError that says what to do."""

import errno
import os
import re

from data.errors import DataError, StorageError

_SECRETS = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_ACCESS_KEY_ID")

_QUERY = re.compile(r"(https?://[^\s?'\"]+)\?[^\s'\")]*[^\s'\").,:;]")

_NO_CREDENTIALS = frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"})
_SILENT = frozenset({"TimeoutError", "ReadTimeoutError", "ConnectTimeoutError", "FSTimeoutError"})
_BROKEN = frozenset(
    {"ConnectionError", "ConnectionClosedError", "HTTPClientError", "ClientConnectionError", "ClientPayloadError"}
    | {"ResponseStreamingError", "IncompleteRead", "IncompleteReadError"}
)
_LASTING = _NO_CREDENTIALS | {
    *("FileNotFoundError", "FileExistsError", "IsADirectoryError", "NotADirectoryError", "PermissionError"),
    *("ImportError", "NotImplementedError", "RecursionError", "ValueError"),
}
_PASSING = (408, 409, 425, 429)
"""Statuses below 500 of servers that are busy."""

NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What the operating system says of a full disk."""

_REMEDIES: tuple[tuple[frozenset[str], str], ...] = (
    (
        _NO_CREDENTIALS,
        "Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE, in the environment of every process; a "
        "public bucket needs none, if its URL begins with anonymous+s3:// (for a source, --anonymous does that)",
    ),
    (
        frozenset({"RequestTimeTooSkewed"}),
        "The clock of this machine is wrong: set it, for example with timedatectl set-ntp true, and run this again",
    ),
    (
        frozenset({"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired", "InvalidToken"}),
        "Get new keys, for example with aws sso login, and set AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and "
        "AWS_SESSION_TOKEN anew in the environment of every process",
    ),
    (
        frozenset({"PermanentRedirect", "TemporaryRedirect", "AuthorizationHeaderMalformed", "301"})
        | {"IllegalLocationConstraintException", "RecursionError"},
        "The bucket is in another region, or at another server, than it was asked for: set AWS_DEFAULT_REGION to its "
        "region, and AWS_ENDPOINT_URL to that of its server if it is not AWS itself",
    ),
    (
        frozenset({"InvalidAccessKeyId", "SignatureDoesNotMatch"}),
        "Its server does not know these keys: check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and AWS_ENDPOINT_URL",
    ),
    (
        frozenset({"PermissionError"}),
        "Check the permissions there and, for a bucket, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment",
    ),
    (frozenset({"FileNotFoundError"}), "Check the spelling, and that the bucket or folder exists"),
    (frozenset({"NotADirectoryError", "FileExistsError"}), "A part of that path is a file: choose another path"),
    (_SILENT | _BROKEN, "Check that the server runs and can be reached, and AWS_ENDPOINT_URL if it is not AWS itself"),
    (
        frozenset({"ImportError", "ValueError"}),
        "Use a path, file://, s3://, or install the fsspec package for that scheme",
    ),
)
"""What errors are called, and what helps. Names of classes, as those of plug-ins may not be installed; and S3's codes.

botocore asks a bucket that has moved where it is, and where that is answered alike, again: a RecursionError.
"""


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__} | {s3_code(error)}


def s3_code(error: BaseException) -> str:
    """What S3 calls the error, such as "ExpiredToken"; only the status, such as "403", if that is all it said."""
    response = getattr(error.__cause__ or error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


def status(error: BaseException) -> int | None:
    """The HTTP status behind an error, if there is one."""
    response = getattr(error.__cause__ or error, "response", None)
    if isinstance(response, dict):
        return response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    return getattr(error, "status", None)


def cause(error: BaseException) -> str:
    """A few words for what went wrong, to be counted."""
    names, code = _names(error), status(error)
    if isinstance(error, EOFError):
        return "short answer"
    if names & _SILENT:
        return "no answer in time"
    if code is not None:
        return f"status {code}"
    return "connection broken off" if names & _BROKEN else type(error).__name__


def is_lasting(error: BaseException) -> bool:
    """Whether trying again cannot help."""
    code = status(error)
    refused = code is not None and 300 <= code < 500 and code not in _PASSING
    full = isinstance(error, OSError) and error.errno in NO_SPACE
    return refused or full or bool(_names(error) & _LASTING)


def failure(action: str, url: str, error: BaseException, attempts: int = 1) -> DataError:
    """The DataError "cannot {action} {url}: ...", with the cause, a remedy, and no secret from the environment.

    It is a StorageError where trying again later can help.
    """
    if isinstance(error, OSError) and error.errno in NO_SPACE:
        remedy = "Free some space there, or choose another place"
    else:
        fitting = (remedy for names, remedy in _REMEDIES if names & _names(error))
        remedy = next(fitting, "Check the URL, the free space and the permissions there")
    detail = " ".join(str(error).split())[:300].rstrip(".") or "no details"
    tried = f" ({attempts} attempts)" if attempts > 1 else ""
    name = type(error).__name__ if s3_code(error)[:1] in "0123456789" else s3_code(error)
    if isinstance(error, RecursionError):
        name, detail = "PermanentRedirect", "every request is sent on to another place"
    text = f"cannot {action} {url}{tried}: {name}: {detail}. {remedy}."
    for variable in _SECRETS:
        if secret := os.environ.get(variable):
            text = text.replace(secret, "***")
    # The query of a URL may be a signature.
    return (DataError if is_lasting(error) else StorageError)(_QUERY.sub(r"\1?***", text))
