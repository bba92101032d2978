"""Files over HTTP from a server that breaks off, and from one whose URLs are signed."""

import hashlib
import http.server
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data import store
from data.errors import DataError
from data.store import transfer
from data.store.failures import failure


class _Faulty(http.server.BaseHTTPRequestHandler):
    """Serves ranges of PAYLOAD; the first `failures` range requests break off in the middle of the body."""

    PAYLOAD = bytes(range(256)) * 40_000
    failures = 0

    def do_HEAD(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.PAYLOAD)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()

    def do_GET(self) -> None:
        stated = self.headers["Range"]
        first, last = (int(number) for number in stated.removeprefix("bytes=").split("-"))
        body = self.PAYLOAD[first : last + 1]
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(self.PAYLOAD)}")
        self.end_headers()
        if type(self).failures > 0:
            type(self).failures -= 1
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
        else:
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def faulty() -> Iterator[Callable[[int], str]]:
    """The URL of a file whose first n range requests break off."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Faulty)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()

    def start(failures: int) -> str:
        _Faulty.failures = failures
        return f"http://127.0.0.1:{server.server_port}/file"

    yield start
    server.shutdown()
    thread.join()
    server.server_close()


def test_fetch_tries_broken_ranges_again(faulty, tmp_path: Path) -> None:
    digest = hashlib.sha256(_Faulty.PAYLOAD).hexdigest()
    store.fetch(faulty(2), len(_Faulty.PAYLOAD), digest, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == _Faulty.PAYLOAD


def test_fetch_gives_up_on_a_server_that_always_breaks_off(
    faulty, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "_FETCH_DEADLINE", 1.0)
    monkeypatch.setattr(transfer, "_SLOWEST_BYTES_PER_SECOND", 1e12)
    url = faulty(10**6)
    with pytest.raises(DataError, match=rf"cannot read bytes 0 to 8388608 of {url} \([3-6] attempts\)"):
        store.fetch(url, len(_Faulty.PAYLOAD), None, tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_a_signature_in_a_url_is_not_shown(unused_port: int) -> None:
    url = f"http://127.0.0.1:{unused_port}/weights.pt"
    with pytest.raises(DataError, match=r"cannot read .*weights.pt\?\*\*\*") as caught:
        store.read_bytes(f"{url}?X-Amz-Signature=abc123&X-Amz-Date=1")
    assert "abc123" not in str(caught.value) and "X-Amz" not in str(caught.value)
    error = failure("read", f"{url}?sig=abc123", FileNotFoundError(f"{url}?sig=abc123"))
    assert str(error).startswith(f"cannot read {url}?***: FileNotFoundError: {url}?***. Check the spelling")
