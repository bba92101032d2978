"""Measures the loader on CIFAR-10 against stock webdataset and a folder of PNG files, from a local folder and from S3.

python -m benchmarks.loader --source ../shared/datasets/cifar-10-python.tar.xz

Every row is a fresh process that runs one loader alone: images a second of CPU time (the figure "per core"), images a
second of wall time, seconds to the first batch, and its peak memory with that of its imports. S3 is `rclone serve s3`
on this machine. Then two processes take 20,000 images/s each from one warm cache and print their share of waiting.
"""

import argparse
import io
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from data import store
from data.cache import ShardCache
from data.loader import Loader
from data.manifest import load_manifest
from data.order import shuffle_of
from data.prepare import Choices, prepare
from tests.servers import s3_server

BATCH = 256
BUDGET = 256 * 2**20
ALLOWED_MEMORY = 300 * 2**20
LOADERS = ("webdataset raw", "webdataset png", "image folder", "ours cold", "ours warm")


class ImageFiles(Dataset[tuple[torch.Tensor, int]]):
    """PNG files named LABEL-NUMBER.png, read one by one, as torchvision's ImageFolder does."""

    def __init__(self, url: str) -> None:
        self.url, self.names = url, store.list_names(url)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        name = self.names[index]
        with Image.open(io.BytesIO(store.read_bytes(store.join(self.url, name)))) as image:
            pixels = np.asarray(image.convert("RGB"))
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(name.partition("-")[0])


def ours(url: str, cache: str, rank: int = 0, ranks: int = 1) -> Iterator[tuple[int, float]]:
    """Size of each batch of this rank, and the seconds it was waited for."""
    manifest = load_manifest(url)
    loader = Loader(
        cache=ShardCache(url, manifest, "train", Path(cache), BUDGET),
        shuffle=shuffle_of(manifest, "train"),
        batch_size=BATCH * ranks,
        seed=0,
        rank=rank,
        world_size=ranks,
        flip=True,
    )
    for batch in loader.batches(0):
        yield len(batch.ids), batch.wait


def stock(url: str, extension: str) -> Iterator[tuple[int, float]]:
    import fsspec
    from webdataset.compat import WebDataset
    from webdataset.gopen import gopen_schemes

    shards = [store.join(url, shard.path) for shard in load_manifest(url).split("train").shards]
    gopen_schemes["s3"] = lambda place, mode="rb", bufsize=8192, **_: fsspec.filesystem("s3").open(place, mode)
    pipeline: Any = WebDataset(shards, shardshuffle=100, seed=0).shuffle(1000).decode("torchrgb8")
    for images, _ in pipeline.to_tuple(extension, "cls").batched(BATCH):
        yield len(images), 0.0


def batches(loader: str, places: dict[str, str]) -> Iterator[tuple[int, float]]:
    if loader.startswith("webdataset"):
        kind = loader.removeprefix("webdataset ")
        yield from stock(places[kind], "ppm" if kind == "raw" else "png")
    elif loader == "image folder":
        files = DataLoader(ImageFiles(places["files"]), batch_size=BATCH, shuffle=True)
        yield from ((len(images), 0.0) for images, _ in files)
    else:
        yield from ours(places["raw"], places["cache"])


def measured(loader: str, places: dict[str, str], images: int) -> dict[str, float]:
    """What one loader does in this process."""
    torch.set_num_threads(1)
    base = resource.getrusage(resource.RUSAGE_SELF)
    began, seen, first = time.perf_counter(), 0, 0.0
    for size, _ in batches(loader, places):
        first = first or time.perf_counter() - began
        seen += size
        if seen >= images:
            break
    wall, used = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_SELF)
    cpu = used.ru_utime + used.ru_stime - base.ru_utime - base.ru_stime
    peaks = {"peak": used.ru_maxrss * 1024, "imports": base.ru_maxrss * 1024}
    return {"per core": seen / cpu, "wall": seen / wall, "first": first, "images": seen, **peaks}


def throttled(places: dict[str, str], rank: int, ranks: int, rate: float, seconds: float) -> dict[str, float]:
    """Takes batches at a fixed rate, as a GPU would, and returns the share of time spent waiting for them."""
    torch.set_num_threads(1)
    steps = ours(places["raw"], places["cache"], rank, ranks)
    next(steps)
    began, waited, taken = time.perf_counter(), 0.0, 0
    for size, wait in islice(steps, int(rate * seconds / BATCH)):
        waited, taken = waited + wait, taken + size
        time.sleep(max(0.0, began + taken / rate + waited - time.perf_counter()))
    elapsed = time.perf_counter() - began
    return {"rate": taken / elapsed, "waiting": waited / elapsed}


def child(call: list[str], env: dict[str, str]) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.loader", *call]
    return subprocess.Popen(command, env=os.environ | env, stdout=subprocess.PIPE, text=True)


def answer(process: "subprocess.Popen[str]") -> dict[str, float]:
    out, _ = process.communicate()
    if process.returncode:
        raise SystemExit(f"{process.args} failed")
    return json.loads(out.splitlines()[-1])


def compare(name: str, places: dict[str, str], env: dict[str, str], counts: dict[str, int]) -> None:
    """One table: every loader on the sets at `places`."""
    print(f"\n{name:15}  images/s per core  images/s wall  first batch s  peak MiB (imports)", flush=True)
    found: dict[str, dict[str, float]] = {}
    for loader in LOADERS:
        row = answer(child(["--measure", loader, "--places", json.dumps(places), "--count", str(counts[loader])], env))
        found[loader] = row
        memory = f"{row['peak'] / 2**20:8.0f} ({row['imports'] / 2**20:.0f})"
        print(
            f"{loader:15}  {row['per core']:17,.0f}  {row['wall']:13,.0f}  {row['first']:13.2f}  {memory}", flush=True
        )
    for ours_, least in (("ours cold", 3), ("ours warm", 20)):
        ratios = {
            other: found[ours_]["per core"] / found[f"webdataset {other}"]["per core"] for other in ("raw", "png")
        }
        print(
            f"{ours_} over webdataset: {ratios['raw']:.1f} on raw, {ratios['png']:.1f} on png shards (>= {least} asked)"
        )
    largest = max(found["ours cold"]["peak"], found["ours warm"]["peak"])
    print(f"peak memory: {largest / 2**20:.0f} MiB of {(BUDGET + ALLOWED_MEMORY) / 2**20:.0f} allowed", flush=True)


def write_files(url: str, folder: Path, count: int) -> None:
    """The first images of a set as PNG files."""
    cache = ShardCache(url, load_manifest(url), "train", folder.parent / "cache-files", BUDGET)
    images, labels = cache.take(np.arange(count))
    folder.mkdir(parents=True)
    for index, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        Image.fromarray(image.transpose(1, 2, 0)).save(folder / f"{label}-{index:05d}.png")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.loader")
    parser.add_argument("--source", help="cifar-10-python.tar.gz or .xz, or its unpacked folder")
    parser.add_argument("--images", type=int, default=50_000, help="images that stock loaders read")
    parser.add_argument("--epochs", type=int, default=5, help="epochs of the warm cache")
    parser.add_argument("--rate", type=float, default=20_000, help="images a second that each of two processes takes")
    parser.add_argument("--seconds", type=float, default=20, help="length of that run")
    for name in ("--measure", "--places", "--count", "--rank"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measured(options.measure, json.loads(options.places), int(options.count))))
    elif options.rank:
        places = json.loads(options.places)
        print(json.dumps(throttled(places, int(options.rank), 2, options.rate, options.seconds)))
    else:
        run(options)


def run(options: argparse.Namespace) -> None:
    few = min(options.images, 3000)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name, "s3", "bucket")
        for encoding in ("raw", "png"):
            prepare("cifar10", options.source, str(root / encoding), choices=Choices(encoding=encoding))
        write_files(str(root / "raw"), root / "files", few)
        counts = {loader: options.images for loader in LOADERS}
        counts |= {"image folder": few, "ours cold": 50_000, "ours warm": 50_000 * options.epochs}
        places = {kind: str(root / kind) for kind in ("raw", "png", "files")} | {"cache": str(Path(name, "cache"))}
        compare("local folder", places, {}, counts)
        with s3_server(root.parent) as server:
            remote = {kind: f"s3://bucket/{kind}" for kind in ("raw", "png", "files")}
            compare("S3", remote | {"cache": str(Path(name, "cache-s3"))}, server.env, counts)
        call = ["--places", json.dumps(places), "--rate", str(options.rate), "--seconds", str(options.seconds)]
        for rank, found in enumerate([answer(one) for one in [child([*call, "--rank", str(r)], {}) for r in (0, 1)]]):
            print(
                f"rank {rank}: {found['rate']:,.0f} images/s, {found['waiting']:.2%} of the time waiting (<= 1 % asked)"
            )


if __name__ == "__main__":
    main()
