"""A faulty server in front of the bucket, and a store that counts from zero and has little patience."""

from collections.abc import Iterator
from contextlib import contextmanager

import fsspec
import pytest
from faults import Faults, Put, Spoilt, faulty_proxy

from data.store import filesystems, transfer


@pytest.fixture
def spoilt(s3_server, bucket: str, use_server) -> Spoilt:
    """Puts a proxy between this process and the S3 server for a while."""

    @contextmanager
    def between(faults: Faults) -> Iterator[Faults]:
        with faulty_proxy(s3_server.endpoint, faults) as url:
            use_server(url, s3_server.key, s3_server.secret)
            try:
                yield faults
            finally:
                use_server(s3_server.endpoint, s3_server.key, s3_server.secret)

    return between


@pytest.fixture(autouse=True)
def counts_from_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transfer, "_retries", type(transfer._retries)())


@pytest.fixture
def small_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranges of 64 KiB, so that a small file takes many."""
    monkeypatch.setattr(transfer, "RANGE_BYTES", 64 * 2**10)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent server is given up after half a second, and everything after three."""
    monkeypatch.setattr(filesystems, "_READ_SECONDS", 0.5)
    monkeypatch.setattr(transfer, "_FETCH_DEADLINE", 3.0)
    monkeypatch.setattr(transfer, "_SLOWEST_BYTES_PER_SECOND", 1e12)


@pytest.fixture(scope="module")
def put(s3_server) -> Put:
    """Writes an object past any proxy, or removes it."""
    options = {"key": s3_server.key, "secret": s3_server.secret, "endpoint_url": s3_server.endpoint}
    direct = fsspec.filesystem("s3", skip_instance_cache=True, **options)
    return lambda url, payload: direct.rm_file(url) if payload is None else direct.pipe_file(url, payload)
