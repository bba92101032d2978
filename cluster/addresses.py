"""Whether something listens where a cluster should be; Ray itself asks for minutes, deaf to Ctrl-C."""

from __future__ import annotations

import socket
from urllib.parse import urlsplit

from cluster.errors import ClusterError

CONNECT_SECONDS = 10.0


def require_listener(address: str, what: str, remedy: str) -> None:
    """Raise ClusterError unless `address` (`host:port`, or a URL) is well-formed and accepts connections.

    Args:
        address: where to connect.
        what: what should listen there, for the message.
        remedy: what to do if nothing does, for the message.
    """
    url = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = url.hostname, url.port or {"http": 80, "https": 443}.get(url.scheme)
    except ValueError:
        host = port = None
    if not host or not port:
        raise ClusterError(f"{address!r} is no address of {what}: host and port are wanted")
    try:
        socket.create_connection((host, port), timeout=CONNECT_SECONDS).close()
    except OSError as error:
        raise ClusterError(f"no {what} answers at {address} ({error}); {remedy}") from error
