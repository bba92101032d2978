"""JSON <-> frozen dataclasses, strictly: nothing is converted, no key is passed over. Pydantic does the work."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from bcm.types import BCMError

T = TypeVar("T")

_UNKNOWN = ("unexpected_keyword_argument", "extra_forbidden")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument", "union_tag_not_found")


def read(
    kind: type[T],
    text: str | bytes,
    where: str,
    error: Callable[[str], Exception] = BCMError,
    *,
    complete: bool = False,
) -> T:
    """The value of type `kind` in a JSON text.

    Args:
        kind: a dataclass, or any type that pydantic knows. A list stands for a tuple, a whole number for a float;
            nothing else is converted. What its `__post_init__` raises as a ValueError is reported like the rest.
        text: the JSON.
        where: what the text is, such as its URL: every message begins with it.
        error: makes the exception that is raised of a message that names the key, and the nearest to an unknown one.
        complete: refuse what leaves out a key that has a default.
    """
    try:
        value = _adapter(kind).validate_json(text, strict=True, extra="forbid")
    except ValidationError as problem:
        raise error(f"{where}: {_told(kind, problem, text)}") from None
    if complete and (missing := next(_absent(dump(value, kind), json.loads(text)), None)):
        raise error(f"{where}: missing key '{missing}'")
    return value


def dump(value: Any, kind: Any = None) -> Any:
    """The inverse of `read` up to the text: dicts, lists, texts, numbers. `kind`: where `value` is no dataclass."""
    return _adapter(kind or cast(Any, type(value))).dump_python(value, mode="json")


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)


def _absent(whole: Any, given: Any, place: str = "") -> Iterator[str]:
    """The keys of `whole` that `given` lacks, each with its place."""
    if isinstance(whole, Mapping):
        for key, value in cast(Mapping[str, Any], whole).items():
            if key not in given:
                yield f"{place}{key}"
            else:
                yield from _absent(value, given[key], f"{place}{key}.")
    elif isinstance(whole, Sequence) and not isinstance(whole, str):
        for index, value in enumerate(cast(Sequence[Any], whole)):
            yield from _absent(value, given[index], f"{place}{index}.")


def _told(kind: Any, problem: ValidationError, text: str | bytes) -> str:
    """The first thing that is wrong."""
    first = problem.errors()[0]
    if first["type"] == "json_invalid":
        return f"not valid JSON ({first['msg'].removeprefix('Invalid JSON: ')}): it is damaged"
    key = _place(first["loc"], json.loads(text))
    if first["type"] in _UNKNOWN:
        return f"unknown key '{key}'; {_nearest(str(first['loc'][-1]), kind)}"
    if first["type"] in _MISSING:
        tag = str(first.get("ctx", {}).get("discriminator", "")).strip("'")
        return f"missing key '{'.'.join(filter(None, (key, tag)))}'"
    message = str(first.get("ctx", {}).get("error", first["msg"]))
    given = repr(first["input"])
    told = message if first["type"] == "value_error" else f"{message[:1].lower()}{message[1:]}, not {given[:60]}"
    return f"{key}: {told}" if key else told


def _place(location: Sequence[int | str], value: Any) -> str:
    """A location in `value` as a text; pydantic's also names the kinds of unions, which are no keys."""
    parts: list[str] = []
    for number, part in enumerate(location):
        if isinstance(value, dict) and part not in value and number < len(location) - 1:
            continue
        parts.append(str(part))
        inside = isinstance(value, list) or (isinstance(value, dict) and part in value)
        value = cast(Any, value)[part] if inside else None
    return ".".join(parts)


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
