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
    location, context = first["loc"], first.get("ctx", {})
    if "discriminator" in context:  # pydantic places what is wrong with the kind of a union at the union itself
        location = (*location, str(context["discriminator"]).strip("'"))
    keys = _keys_on_the_way(location, json.loads(text))
    if first["type"] in _MISSING:
        return f"missing key '{'.'.join([*keys, str(location[-1])])}'"
    key = ".".join(keys)
    if first["type"] in _UNKNOWN:
        known = sorted(set(_keys(_adapter(kind).json_schema())))
        close = get_close_matches(str(location[-1]).lower(), known, n=1)
        return f"unknown key '{key}'; " + (f"did you mean '{close[0]}'?" if close else f"known are {', '.join(known)}")
    message = str(context.get("error", first["msg"]))
    if first["type"] != "value_error":
        message = f"{message[:1].lower()}{message[1:]}"
        message += "" if "discriminator" in context else f", not {first['input']!r:.60}"
    return f"{key}: {message}" if key else message


def _keys_on_the_way(location: Sequence[int | str], value: Any) -> list[str]:
    """The keys of `value` in a location of pydantic's, which also names the kinds of unions."""
    keys: list[str] = []
    for part in location:
        if (isinstance(value, dict) and part in value) or (isinstance(value, list) and isinstance(part, int)):
            keys.append(str(part))
            value = cast(Any, value)[part]
    return keys


def _keys(schema: Any) -> Iterator[str]:
    """Every key that a JSON schema names."""
    if isinstance(schema, dict):
        parts = cast(dict[str, Any], schema)
        yield from parts.get("properties", {})
        for part in parts.values():
            yield from _keys(part)
