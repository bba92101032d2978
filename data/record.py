"""JSON texts read strictly into dataclasses."""

from functools import cache
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from data.errors import DataError

T = TypeVar("T")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def read_record(kind: type[T], text: str | bytes) -> T:
    """The dataclass in a JSON text, read strictly: a DataError names the key that is wrong, missing or unknown."""
    try:
        return _adapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as problem:
        first = problem.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
            raise DataError(f"unknown key {key!r}") from None
        if first["type"].startswith("missing"):
            raise DataError(f"missing key {key!r}") from None
        if not key:
            raise DataError(first["msg"].lower()) from None
        raise DataError(f"{key}: {first['msg'].lower()}, not {first['input']!r:.60}") from None
