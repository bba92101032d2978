"""An S3 server (rclone over a folder) and small sets of images."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import fsspec
import numpy as np
import pytest
import servers
from hypothesis import settings
from made import write_split
from servers import free_port

from data.manifest import Manifest, write_manifest
from data.prepare.pack import Sample

settings.register_profile("any machine", deadline=None)  # how long an example takes says more of what else runs
settings.load_profile("any machine")


@dataclass(frozen=True)
class Server:
    """A running S3 server: its address, credentials, and the folder whose sub-folders are its buckets."""

    endpoint: str
    key: str
    secret: str
    root: Path


@pytest.fixture
def unused_port() -> int:
    """A port of this machine at which nothing listens."""
    return free_port()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    root = tmp_path_factory.mktemp("s3") / "buckets"
    # Made before the start, as rclone remembers the list of buckets for some minutes.
    (root / "bucket").mkdir(parents=True)
    with servers.s3_server(root) as running:
        keys = running.env["AWS_ACCESS_KEY_ID"], running.env["AWS_SECRET_ACCESS_KEY"]
        yield Server(running.endpoint, *keys, root=root)


UseServer = Callable[[str, str, str], None]


@pytest.fixture
def use_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[UseServer]:
    """Points this process, and those it starts, at an S3 server: endpoint, key, secret."""

    def use(endpoint: str, key: str, secret: str) -> None:
        for name, value in (
            ("AWS_ENDPOINT_URL", endpoint),
            ("AWS_ACCESS_KEY_ID", key),
            ("AWS_SECRET_ACCESS_KEY", secret),
            ("AWS_REGION", "us-east-1"),
            ("AWS_EC2_METADATA_DISABLED", "true"),
        ):
            monkeypatch.setenv(name, value)
        # fsspec keeps connected file systems for the life of a process, as the environment normally stays the same.
        fsspec.get_filesystem_class("s3").clear_instance_cache()

    yield use
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture
def bucket(s3_server: Server, use_server: UseServer) -> str:
    """The URL of an empty place in a bucket, with the environment set for it."""
    use_server(s3_server.endpoint, s3_server.key, s3_server.secret)
    return f"s3://bucket/{secrets.token_hex(4)}"


def _random_samples(count: int, *, resolution: int = 6, channels: int = 3, seed: int = 0) -> list[Sample]:
    shape = (count, resolution, resolution, 3) if channels == 3 else (count, resolution, resolution)
    images = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return [Sample(key=f"s{index:04d}", image=image, label=index % 4) for index, image in enumerate(images)]


def _write_set(url: str, samples: list[Sample], *, samples_per_shard: int = 10, resolution: int = 6) -> Manifest:
    split = write_split(url, "train", samples, samples_per_shard=samples_per_shard)
    manifest = Manifest(
        name="random",
        resolution=resolution,
        channels=3 if samples[0].image.ndim == 3 else 1,
        class_names=("a", "b", "c", "d"),
        flip=True,
        splits={"train": split},
    )
    write_manifest(url, manifest)
    return manifest


@pytest.fixture
def random_samples() -> Callable[..., list[Sample]]:
    """Makes images of noise: count, then resolution (6), channels (3), seed (0)."""
    return _random_samples


@pytest.fixture
def write_set() -> Callable[..., Manifest]:
    """Writes samples as the split "train" of a set of four classes: url, samples, samples_per_shard, resolution."""
    return _write_set
