"""JSON <-> frozen dataclasses, strictly: nothing is converted, no key is passed over. Pydantic does the work."""

from collections.abc import Callable, Iterator
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from bcm.types import BCMError

T = TypeVar("T")

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument", "union_tag_not_found")


def read(kind: type[T], text: str | bytes, where: str, error: Callable[[str], Exception] = BCMError) -> T:
    """The value of type `kind` in a JSON text.

    Args:
        kind: a dataclass, or any type that pydantic knows. A list stands for a tuple, a whole number for a float;
            nothing else is converted. What its `__post_init__` raises as a ValueError is reported like the rest.
        text: the JSON.
        where: what the text is, such as its URL: every message begins with it.
        error: makes the exception that is raised of a message that names the key, and the nearest to an unknown one.
    """
    try:
        return _adapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as found:
        raise error(f"{where}: {_told(kind, found)}") from None


def dump(value: Any, kind: Any = None) -> Any:
    """The inverse of `read` up to the text: dicts, lists, texts, numbers. `kind`: where `value` is no dataclass."""
    return _adapter(kind or cast(Any, type(value))).dump_python(value, mode="json")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _told(kind: Any, found: ValidationError) -> str:
    """The first thing that is wrong."""
    first = found.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] in _UNKNOWN:
        return f"unknown key '{key}'; {_nearest(str(first['loc'][-1]), kind)}"
    if first["type"] in _MISSING:
        return f"missing key '{key}'" if key else "a key is missing"
    if first["type"] == "json_invalid":
        return f"not valid JSON ({first['msg']})"
    message = str(first.get("ctx", {}).get("error", first["msg"]))
    given = repr(first["input"])
    told = message if first["type"] == "value_error" else f"{message[:1].lower()}{message[1:]}, not {given[:60]}"
    return f"{key}: {told}" if key else told


def _nearest(name: str, kind: Any) -> str:
    known = sorted(set(_keys(_adapter(kind).json_schema())))
    close = get_close_matches(name.lower(), known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}"


def _keys(schema: Any) -> Iterator[str]:
    """Every key that a JSON schema names."""
    if isinstance(schema, dict):
        parts = cast(dict[str, Any], schema)
        yield from parts.get("properties", {})
        for part in parts.values():
            yield from _keys(part)
