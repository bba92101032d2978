"""Storage on disk and on a real S3 server."""

import hashlib
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.fs
import pytest

from data import store
from data.errors import DataError


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A writable URL of each kind."""
    return str(tmp_path / "store") if request.param == "local" else request.getfixturevalue("bucket") + "/store"


def test_bytes_and_json_round_trip(place: str) -> None:
    target = store.join(place, "deep", "er", "value.json")
    assert not store.exists(target)
    store.write_json(target, {"b": [1, 2.5], "a": "ä"})
    assert store.exists(target)
    assert store.read_json(target) == {"b": [1, 2.5], "a": "ä"}
    store.write_bytes(target, b"second")
    assert store.read_bytes(target) == b"second"
    store.remove(target)
    store.remove(target)
    assert not store.exists(target)


def test_listing(place: str) -> None:
    assert store.list_names(place) == []
    for name, size in (("b.tar", 5), ("a.tar", 3), ("sub/c.tar", 2)):
        store.write_bytes(store.join(place, name), b"x" * size)
    assert store.list_names(place) == ["a.tar", "b.tar", "sub"]
    assert store.file_sizes(place) == {"a.tar": 3, "b.tar": 5}
    store.write_bytes(store.join(place, "d.tar"), b"")
    assert store.list_names(place) == ["a.tar", "b.tar", "d.tar", "sub"]


def test_a_tree_is_listed(place: str) -> None:
    assert store.walk(place) == {}
    sizes = {"a.bin": 1000, "sub/b.json": 2, "sub/deep/c": 0}
    for name, size in sizes.items():
        store.write_bytes(store.join(place, name), b"x" * size)
    assert store.walk(place) == sizes
    assert store.walk(store.join(place, "a.bin")) == {"": 1000}


def test_the_write_check_leaves_nothing(place: str) -> None:
    store.check_writable(place)
    assert store.file_sizes(place) == {}


def test_reading_what_is_absent_names_it(place: str) -> None:
    with pytest.raises(DataError, match=r"cannot read .*nothing\.json.*Check the spelling"):
        store.read_json(store.join(place, "nothing.json"))


def test_damaged_json_names_the_file(place: str) -> None:
    store.write_bytes(store.join(place, "value.json"), b'{"a": ')
    with pytest.raises(DataError, match=r"value\.json is not valid JSON"):
        store.read_json(store.join(place, "value.json"))


@pytest.mark.parametrize("length", [0, 1, store.RANGE_BYTES, store.RANGE_BYTES + 1])
def test_fetch_copies_whole_files(place: str, tmp_path: Path, length: int) -> None:
    payload = os.urandom(length)
    store.write_bytes(store.join(place, "x"), payload)
    store.fetch(store.join(place, "x"), length, hashlib.sha256(payload).hexdigest(), tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == payload


@pytest.mark.parametrize(
    ("stated", "sha256", "message"),
    [
        (11, None, "has 10 bytes, but 11 are expected: it is cut short"),
        (9, None, "has 10 bytes, but 9 are expected: it is longer"),
        (10, "0" * 64, "is damaged: its 10 bytes have SHA-256"),
    ],
)
def test_fetch_refuses_other_bytes(place: str, tmp_path: Path, stated: int, sha256: str | None, message: str) -> None:
    store.write_bytes(store.join(place, "x"), b"0123456789")
    with pytest.raises(DataError, match=message):
        store.fetch(store.join(place, "x"), stated, sha256, tmp_path / "to" / "copy")
    assert list((tmp_path / "to").iterdir() if (tmp_path / "to").exists() else []) == []


def test_fetch_names_what_is_missing(place: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*/x: FileNotFoundError"):
        store.fetch(store.join(place, "x"), 1, None, tmp_path / "copy")


def test_absolute_and_join(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.absolute("runs/a") == str(tmp_path / "runs/a")
    assert store.absolute(f"file://{tmp_path}/a") == str(tmp_path / "a")
    assert store.absolute("s3://bucket/a") == "s3://bucket/a"
    assert store.join("s3://bucket/a/", "b", "c.json") == "s3://bucket/a/b/c.json"
    assert store.join("/", "a") == "/a"
    assert store.join("runs", "a") == "runs/a"


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("", "empty"),
        ("s3://", "names no bucket"),
        ("foo://bucket/a", "Protocol not known"),
        ("simplecache::s3://bucket/a", "chains"),
        ("/proc/nowhere/a", "cannot write to /proc/nowhere/a"),
        ("s3://key:hush@bucket/a", "holds credentials"),
    ],
)
def test_urls_that_cannot_be_written(url: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        store.check_writable(url)
    assert "hush" not in str(caught.value)


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(DataError, match="A part of that path is a file"):
        store.check_writable(str(tmp_path / "file" / "sub"))


def test_a_missing_bucket_is_named(bucket: str) -> None:
    assert bucket.startswith("s3://bucket/")
    with pytest.raises(DataError, match=r"cannot write to s3://another/x.*bucket does not exist"):
        store.check_writable("s3://another/x")


def test_wrong_credentials_are_told_without_showing_them(bucket: str, s3_server, use_server) -> None:
    store.write_bytes(f"{bucket}/x", b"1")
    use_server(s3_server.endpoint, s3_server.key, "not-the-secret")
    for attempt in (store.check_writable, store.read_bytes, store.exists, store.list_names):
        with pytest.raises(DataError, match="AWS_SECRET_ACCESS_KEY") as caught:
            attempt(f"{bucket}/x")
        assert "not-the-secret" not in str(caught.value)
        assert s3_server.key not in str(caught.value)


def test_no_credentials_at_all(bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError, match="Set AWS_ACCESS_KEY_ID"):
        store.check_writable(f"{bucket}/x")


def test_an_unreachable_server_is_told_soon(bucket: str, use_server, unused_port: int) -> None:
    use_server(f"http://127.0.0.1:{unused_port}", "key-key-key", "secret-secret")
    began = time.monotonic()
    with pytest.raises(DataError, match=r"cannot write to .*AWS_ENDPOINT_URL"):
        store.check_writable(f"{bucket}/x")
    assert time.monotonic() - began < 15


def test_a_server_that_never_answers_is_told_soon(bucket: str, use_server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "_CHECK_SECONDS", 1.0)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        use_server(f"http://127.0.0.1:{silent.getsockname()[1]}", "key-key-key", "secret-secret")
        with pytest.raises(DataError, match="no answer within 1 seconds"):
            store.check_writable(f"{bucket}/x")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "x"
    store.write_bytes(str(target), b"old")
    limited = (
        "import resource, signal, sys; from data import store\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"store.write_bytes({str(target)!r}, b'n' * 5000)\n"
    )
    run = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, cwd=ROOT, check=False)
    assert "DataError: cannot write" in run.stderr
    assert target.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


ROOT = Path(__file__).resolve().parents[3]


def test_rays_file_system_pickles_without_credentials(bucket: str, s3_server) -> None:
    filesystem, path = store.arrow_filesystem(f"{bucket}/runs")
    assert filesystem is not None
    assert path == f"{bucket}/runs".removeprefix("s3://")
    pickled = pickle.dumps(filesystem)
    assert s3_server.secret.encode() not in pickled
    assert s3_server.key.encode() not in pickled
    # A process of its own reads its credentials from its own environment.
    script = (
        "import pickle, sys; fs = pickle.load(sys.stdin.buffer)\n"
        f"with fs.open_output_stream('{path}/a') as out: out.write(b'from afar')\n"
        f"print(fs.open_input_stream('{path}/a').read().decode())"
    )
    run = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, check=False)
    assert (run.returncode, run.stdout.strip()) == (0, b"from afar"), run.stderr.decode()
    assert store.read_bytes(f"{bucket}/runs/a") == b"from afar"
    assert filesystem.get_file_info(f"{path}/a").type == pyarrow.fs.FileType.File


def test_rays_file_system_of_a_local_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert store.arrow_filesystem("runs") == (None, str(tmp_path / "runs"))


def test_s3_works_in_a_forked_child(bucket: str) -> None:
    store.write_bytes(f"{bucket}/x", b"parent")
    child = os.fork()
    if child == 0:
        os._exit(0 if store.read_bytes(f"{bucket}/x") == b"parent" else 1)
    assert _exit_code(child, seconds=20) == 0


def _exit_code(child: int, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.05)
    os.kill(child, 9)
    os.waitpid(child, 0)
    return None
