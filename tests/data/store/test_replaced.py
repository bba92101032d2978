"""A file that is replaced while it is read is read anew, and what is put together is never of two versions."""

import hashlib
from collections.abc import Iterator
from itertools import count, cycle
from pathlib import Path

import numpy as np
import pytest
from faults import Faults, Put, Spoilt

from data import store
from data.errors import DataError
from data.prepare.remote import open_seekable
from data.store import transfer

OLD, NEW = (np.random.default_rng(seed).bytes(150_000) for seed in range(2))


def digest(payload: bytes) -> str:
    return hashlib.sha256(payload).hexdigest()


def replacing(put: Put, url: str, payloads: Iterator[bytes]) -> Faults:
    """No faults, but before each second range of the file that is read, it is replaced."""
    asked = count(1)

    def before(method: str, path: str) -> None:
        if method == "GET" and path.endswith("/x") and next(asked) % 2 == 0 and (payload := next(payloads, None)):
            put(url, payload)

    return Faults(before=before)


def test_a_file_replaced_while_it_is_read_is_read_anew(
    bucket: str, spoilt: Spoilt, put: Put, small_ranges: None, tmp_path: Path
) -> None:
    url = f"{bucket}/x"
    for sha256 in (digest(NEW), None):
        put(url, OLD)
        with spoilt(replacing(put, url, iter([NEW]))):
            store.fetch(url, len(NEW), sha256, tmp_path / "copy")
        assert (tmp_path / "copy").read_bytes() == NEW
        put(url, OLD)
        with spoilt(replacing(put, url, iter([NEW]))):
            assert store.read_bytes(url) == NEW
    assert store.retries() == {"file replaced while it was read": 4}


def test_a_file_that_is_replaced_all_the_time_is_an_error(
    bucket: str, spoilt: Spoilt, put: Put, small_ranges: None, tmp_path: Path
) -> None:
    put(f"{bucket}/x", OLD)
    faults = replacing(put, f"{bucket}/x", cycle([NEW, OLD]))
    with spoilt(faults), pytest.raises(DataError, match=rf"{bucket}/x was replaced while it was read: read it again"):
        store.fetch(f"{bucket}/x", len(OLD), None, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_becomes_shorter_is_seen(
    bucket: str, spoilt: Spoilt, put: Put, small_ranges: None, tmp_path: Path
) -> None:
    url = f"{bucket}/x"
    put(url, OLD)
    message = rf"{url} has 1000 bytes, but 150000 are expected: it is cut short"
    with spoilt(replacing(put, url, iter([NEW[:1000]]))), pytest.raises(DataError, match=message):
        store.fetch(url, len(OLD), digest(OLD), tmp_path / "copy")
    put(url, OLD)
    with spoilt(replacing(put, url, iter([NEW[:1000]]))):
        store.fetch(url, None, None, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == NEW[:1000]


def test_an_archive_replaced_between_two_reads_is_an_error(bucket: str, put: Put) -> None:
    put(f"{bucket}/x", OLD * 20)
    with open_seekable(f"{bucket}/x") as file:
        assert file.read(1000) == OLD[:1000]
        put(f"{bucket}/x", NEW * 20)
        file.seek(2_500_000)
        with pytest.raises(DataError, match="was replaced while it was read"):
            file.read(1000)


def test_a_local_file_replaced_while_it_is_read_is_read_anew(
    small_ranges: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, asked, read = tmp_path / "x", count(1), transfer._range
    source.write_bytes(OLD)

    def replacing_first(*arguments) -> bytes:
        if next(asked) == 2:
            (tmp_path / "new").write_bytes(NEW)
            (tmp_path / "new").rename(source)
        return read(*arguments)

    monkeypatch.setattr(transfer, "_range", replacing_first)
    store.fetch(str(source), None, None, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == NEW
