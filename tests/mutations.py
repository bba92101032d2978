"""Damage to the bytes of a file: each change takes them and a source of random numbers, and returns other bytes."""

import copy
import io
import json
import random
import tarfile
from collections.abc import Callable
from typing import Any

CHANGES = 3
"""Changes of one file, at most."""


def changed_byte(raw: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(raw))
    return raw[:at] + bytes([chance.randrange(256)]) + raw[at + 1 :]


def changed_bit(raw: bytes, chance: random.Random) -> bytes:
    at = chance.randrange(len(raw))
    return raw[:at] + bytes([raw[at] ^ 1 << chance.randrange(8)]) + raw[at + 1 :]


def cut(raw: bytes, chance: random.Random) -> bytes:
    return raw[: chance.randrange(len(raw))]


def grown(raw: bytes, chance: random.Random) -> bytes:
    return raw + chance.choice([bytes(512), chance.randbytes(chance.randrange(1, 2000)), raw])


def without_a_piece(raw: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(raw))
    return raw[:start] + raw[start + chance.choice([1, 2, 17, 512, 1024]) :]


def with_a_piece(raw: bytes, chance: random.Random) -> bytes:
    at, source = chance.randrange(len(raw)), chance.randrange(len(raw))
    return raw[:at] + raw[source : source + chance.choice([1, 2, 17, 512, 1024])] + raw[at:]


def zeroed(raw: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(raw)) // 512 * 512
    size = min(chance.choice([512, 1024]), len(raw) - start)
    return raw[:start] + bytes(size) + raw[start + size :]


def swapped(raw: bytes, chance: random.Random) -> bytes:
    first, second = sorted(chance.randrange(len(raw)) // 512 * 512 for _ in range(2))
    size = min(512, second - first)
    left, right = raw[first : first + size], raw[second : second + size]
    return raw[:first] + right + raw[first + size : second] + left + raw[second + size :]


ANY = (changed_byte, changed_bit, cut, grown, without_a_piece, with_a_piece, zeroed, swapped)
Change = Callable[[bytes, random.Random], bytes]

FIELDS = {"name": (0, 100), "mode": (100, 108), "size": (124, 136), "kind": (156, 157), "link": (157, 257)}
FIELDS |= {"magic": (257, 265), "prefix": (345, 500)}
ODD = {
    "name": [b"../../escaped.cls", b"/escaped.png", b"a.pyd", b"a.pkl", b"\xff\xfe.png", b"", b".", b"x/", b"a" * 100],
    "mode": [b"0007777\0"],
    "size": [b"77777777777\0", b"-0000000001\0", b"\x80" + bytes(10) + b"\x05", b"\xff" * 12, b"", b"00000000001\0"],
    "kind": [bytes([kind]) for kind in b"\001234567ABDgKLMNSVxX"],
    "link": [b"/etc/passwd", b"../../x"],
    "magic": [b"ustar  \0", b"ustar\x0000", b"GNUtar "],
    "prefix": [b"../..", b"/", b"\xff" * 155],
}


def changed_header(raw: bytes, chance: random.Random) -> bytes:
    """Another value in a member's header, which keeps its checksum right."""
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        at = chance.choice(tar.getmembers()).offset
    name = chance.choice(list(FIELDS))
    start, end = FIELDS[name]
    header = bytearray(raw[at : at + 512])
    header[start:end] = chance.choice(ODD[name]).ljust(end - start, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return raw[:at] + bytes(header) + raw[at + 512 :]


def mutated(raw: bytes, chance: random.Random, special: Change | None) -> bytes:
    """The bytes with one to three changes, one in three of them special."""
    for _ in range(chance.randint(1, CHANGES)):
        change = special if special and chance.random() < 1 / 3 else chance.choice(ANY)
        try:
            raw = change(raw, chance) or b"\0"
        except (tarfile.TarError, IndexError, ValueError, OverflowError, EOFError):
            raw = chance.choice(ANY)(raw, chance) or b"\0"
    return raw


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    1.5,
    1e308,
    10**30,
    "",
    "train",
    "../x",
    "x" * 1000,
    "\ud800",
    [],
    {},
]
VALUES += [[1], {"a": 1}, [[]], "0" * 64, "/dev/zero", "a/./b", "a\\b"]


def nodes(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The ways to every value within a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(way for key, child in inner for way in nodes(child, (*path, key)))]


def changed_value(raw: bytes, chance: random.Random) -> bytes:
    """A JSON value in which one value is another, is gone, or comes twice."""
    value = json.loads(raw)
    way = chance.choice(nodes(value)[1:])
    holder = value
    for key in way[:-1]:
        holder = holder[key]
    kind = chance.choice(["other", "near", "gone", "twice", "moved"])
    if kind == "gone":
        del holder[way[-1]]
    elif kind == "twice" and isinstance(holder, list):
        holder.append(copy.deepcopy(holder[way[-1]]))
    elif kind == "moved" and isinstance(holder, dict):
        holder[chance.choice(["train", "test", "root", "count", "x"])] = holder.pop(way[-1])
    elif kind == "near" and isinstance(holder[way[-1]], int):
        holder[way[-1]] += chance.choice([-512, -1, 1, 512])
    else:
        holder[way[-1]] = chance.choice(VALUES)
    return json.dumps(value).encode()
