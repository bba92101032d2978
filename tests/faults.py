"""A server in front of an object store that spoils a share of what passes through it."""

import http.client
import os
import random
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import cast
from urllib.parse import urlsplit

_ERRORS = {500: "InternalError", 503: "SlowDown"}


@dataclass(kw_only=True)
class Faults:
    """What to do to the requests, and what was done.

    Attributes:
        shares: Probability of each kind of fault: "reset" and "stall" come in the middle of the body, "short" is an
            answer that states and holds half of it, "error" a 500 or 503, "flip" a changed bit, "trickle" two bytes a
            second.
        stall_seconds: How long a stalled answer stays away in the middle of its body.
        seed: The same seed and number of a request give the same fault.
        before: Called with the method and the path of each request before it is passed on.
        requests: How many came.
        done: How many were spoilt, by kind.
    """

    shares: Mapping[str, float] = field(default_factory=dict)
    stall_seconds: float = 60.0
    seed: int = 0
    before: Callable[[str, str], None] = lambda method, path: None
    requests: int = 0
    done: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self) -> str:
        """The fault of the next request; "" for none."""
        with self._lock:
            self.requests += 1
            draw = random.Random(f"{self.seed}-{self.requests}").random()
            for kind, share in self.shares.items():
                draw -= share
                if draw < 0:
                    self.done[kind] += 1
                    return kind
            return ""


class _Server(ThreadingHTTPServer):
    """Passes requests on to another server; `ended` wakes those that stall."""

    faults: Faults
    upstream: str
    ended: threading.Event


class _Passing(BaseHTTPRequestHandler):
    """One connection of a client, and one of its own to the server behind."""

    protocol_version = "HTTP/1.1"

    def _pass(self) -> None:
        server = cast(_Server, self.server)
        server.faults.before(self.command, self.path)
        fault = server.faults.next()
        status, headers, body = self._asked(server)
        if fault == "error":
            self._refuse(server.faults.requests)
        elif self.command == "HEAD":
            if fault == "stall":
                server.ended.wait(server.faults.stall_seconds)
            self._head(status, headers)
            if fault == "reset":
                self._reset()
        elif fault == "short":
            self._send(status, headers, body[: len(body) // 2], len(body) // 2)
        elif fault == "flip" and body:
            self._send(status, headers, bytes([body[0] ^ 1]) + body[1:], len(body))
        elif fault == "trickle":
            self._send(status, headers, b"", len(body))
            for byte in body:
                if server.ended.wait(0.5):
                    break
                self.wfile.write(bytes([byte]))
        elif fault in ("reset", "stall"):
            self._send(status, headers, body[: len(body) // 2], len(body))
            if fault == "stall":
                server.ended.wait(server.faults.stall_seconds)
            self._reset()
        else:
            self._send(status, headers, body, len(body))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass

    def _asked(self, server: _Server) -> tuple[int, list[tuple[str, str]], bytes]:
        """The answer of the server behind, which sees the signed headers as they came."""
        sent = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        connection = http.client.HTTPConnection(server.upstream, timeout=60)
        connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for name, value in self.headers.items():
            if name.lower() not in ("expect", "connection"):
                connection.putheader(name, value)
        connection.endheaders(sent)
        answer = connection.getresponse()
        body = answer.read()
        connection.close()
        dropped = ("transfer-encoding", "connection") + (() if self.command == "HEAD" else ("content-length",))
        return answer.status, [pair for pair in answer.getheaders() if pair[0].lower() not in dropped], body

    def _head(self, status: int, headers: list[tuple[str, str]]) -> None:
        self.send_response_only(status)
        for name, value in headers:
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes, stated: int) -> None:
        self._head(status, [*headers, ("Content-Length", str(stated))])
        self.wfile.write(body)

    def _refuse(self, number: int) -> None:
        status = list(_ERRORS)[number % len(_ERRORS)]
        body = f"<Error><Code>{_ERRORS[status]}</Code><Message>Injected.</Message></Error>".encode()
        body = b"" if self.command == "HEAD" else body
        self._send(status, [("Content-Type", "application/xml")], body, len(body))

    def _reset(self) -> None:
        """Ends the connection without a goodbye."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def handle_one_request(self) -> None:
        """As ever, but clients that lose patience are no news."""
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""


Spoilt = Callable[[Faults], AbstractContextManager[Faults]]
"""Puts a proxy between this process and the S3 server for a while."""
Put = Callable[[str, bytes | None], None]
"""Writes an object past any proxy, or removes it."""


@contextmanager
def faulty_proxy(upstream: str, faults: Faults) -> Iterator[str]:
    """The URL of a server in front of the one at the URL `upstream`."""
    server = _Server(("127.0.0.1", 0), _Passing)
    server.faults, server.upstream, server.ended = faults, urlsplit(upstream).netloc, threading.Event()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()
