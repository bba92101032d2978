"""What a server refuses: one message that says why and what helps, after as few requests as that takes."""

import http.server
import threading
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import fsspec
import pytest

from data import store
from data.errors import DataError
from data.prepare.remote import open_seekable

REFUSALS = [
    (403, "RequestTimeTooSkewed", {}, "set it, for example with timedatectl"),
    (400, "ExpiredToken", {}, "Get new keys, for example with aws sso login"),
    (301, "PermanentRedirect", {}, "set AWS_DEFAULT_REGION to its region"),
    (301, "PermanentRedirect", {"x-amz-bucket-region": "eu-west-1"}, "set AWS_DEFAULT_REGION to its region"),
    (400, "AuthorizationHeaderMalformed", {}, "set AWS_DEFAULT_REGION to its region"),
    (403, "InvalidAccessKeyId", {}, "does not know these keys"),
    (403, "SignatureDoesNotMatch", {}, "does not know these keys"),
    (403, "AccessDenied", {}, "Check the permissions there"),
]


@contextmanager
def served(handler: type[http.server.BaseHTTPRequestHandler]) -> Iterator[str]:
    """The URL of a web server, which is gone after the block."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def refusing(status: int, code: str, headers: Mapping[str, str]) -> type[http.server.BaseHTTPRequestHandler]:
    """A server that gives every request the same answer, which for a HEAD has no words."""

    class Refusing(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_GET(self) -> None:
            body = f"<Error><Code>{code}</Code><Message>no</Message></Error>".encode()
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_PUT = do_GET

    return Refusing


@pytest.mark.parametrize("call", [store.walk, store.exists, store.read_bytes, store.check_writable])
@pytest.mark.parametrize(("status", "code", "headers", "remedy"), REFUSALS)
def test_a_refusal_has_the_servers_word_and_what_helps(use_server, call, status, code, headers, remedy: str) -> None:
    with served(refusing(status, code, headers)) as url:
        use_server(url, "AKIA1", "s3cr3t")
        with pytest.raises(DataError, match=rf"s3://bucket/x[^ ]*: {code}: .*{remedy}"):
            call("s3://bucket/x")
    assert not any(cause.startswith("status") for cause in store.retries())


def test_a_public_bucket_is_read_without_keys(use_server, s3_server, monkeypatch, tmp_path: Path) -> None:
    class Public(http.server.BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:
            pass

        def do_HEAD(self) -> None:
            signed = "Authorization" in self.headers
            self.send_response(403 if signed else 200)
            self.send_header("Content-Length", "3")
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            self.wfile.write(b"abc")

    with served(Public) as url:
        use_server(url, "AKIA1", "s3cr3t")
        with pytest.raises(DataError, match="PermissionError: Forbidden"):
            store.read_bytes("s3://bucket/x")
        assert store.anonymous("s3://bucket/x") == "anonymous+s3://bucket/x"
        assert store.read_bytes("anonymous+s3://bucket/x") == b"abc"
        monkeypatch.delenv("AWS_ACCESS_KEY_ID")
        monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
        monkeypatch.setenv("HOME", str(tmp_path))
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(DataError, match=r"a public bucket needs none, .*anonymous\+s3://.*--anonymous"):
            store.read_bytes("s3://bucket/y")
        assert store.read_bytes("anonymous+s3://bucket/y") == b"abc"


@pytest.mark.parametrize("url", ["", "folder", "http://host/x", "gs://bucket/x"])
def test_only_buckets_of_s3_are_read_without_keys(url: str) -> None:
    with pytest.raises(DataError, match="only an s3:// URL can be read without keys"):
        store.anonymous(url)


def test_a_web_server_that_knows_no_ranges_is_asked_once(tmp_path: Path) -> None:
    asked: list[str] = []

    class Whole(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments, directory=str(tmp_path))

        def log_message(self, format: str, *arguments: object) -> None:
            asked.append(self.command)

    content = bytes(range(256)) * 40
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        archive.writestr("a.png", content)
    (tmp_path / "small").write_bytes(content)
    (tmp_path / "large").write_bytes(bytes(store.RANGE_BYTES + 1))
    with served(Whole) as url:
        assert store.walk(f"{url}/set.zip") == {"": (tmp_path / "set.zip").stat().st_size}
        assert "GET" not in asked
        with pytest.raises(DataError, match=r"sends whole files only .* download it first, .* give the local path"):
            zipfile.ZipFile(open_seekable(f"{url}/set.zip"))
        assert asked.count("GET") == 1
        assert store.read_bytes(f"{url}/small") == content
        with pytest.raises(DataError, match="download it first"):
            store.fetch(f"{url}/large", None, None, tmp_path / "copy")
        assert not (tmp_path / "copy").exists() and asked.count("GET") == 4
        listed = store.walk(f"{url}/")
        assert listed == {path.name: path.stat().st_size for path in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["a::b.png", "zip::b", "::"])
def test_two_colons_are_part_of_a_name(bucket: str, tmp_path: Path, name: str) -> None:
    for root in (str(tmp_path), bucket):
        url = store.join(root, name, "c::d.txt")
        store.write_bytes(url, b"x")
        assert store.read_bytes(url) == b"x" and store.exists(url)
        assert store.walk(root) == {f"{name}/c::d.txt": 1}
        store.remove(url)
