"""`python -m benchmarks.encodings`: what an image costs in a shard, by encoding: bytes, CPU time to write and to read.

The images are squares cut from the two photographs that come with scikit-learn, area-resized; all encodings keep every
pixel. A shard member also needs a header, and its label: 1,536 bytes.
"""

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images

from data.decode import decode_shard
from data.manifest import Manifest, SplitManifest
from data.prepare.pack import ENCODINGS, Sample, pack, shard_of
from data.prepare.pixels import area_resized

_COUNTS = {32: 2000, 64: 1000, 128: 250, 256: 120}


def squares(resolution: int, count: int) -> list[NDArray[np.uint8]]:
    """Random squares of the photographs, at least as large as they become."""
    chance = np.random.default_rng(0)
    bunch: Any = load_sample_images()
    found: list[NDArray[np.uint8]] = []
    for number in range(count):
        photo = np.asarray(bunch.images[number % len(bunch.images)], np.uint8)
        side = int(chance.integers(resolution, 427))
        top, left = (int(chance.integers(0, extent - side + 1)) for extent in photo.shape[:2])
        cut = photo[top : top + side, left : left + side]
        found.append(area_resized(partial(_lines, cut), (side, side), (resolution, resolution)))
    return found


def _lines(image: NDArray[np.uint8], first: int, last: int) -> NDArray[np.uint8]:
    return image[first:last]


def measure(resolution: int, encoding: str, images: list[NDArray[np.uint8]], folder: Path) -> str:
    """One row: bytes of an image, images written and read in a second of CPU time, best of three."""
    samples = [Sample(key=f"{number:08d}", image=image, label=0) for number, image in enumerate(images)]
    wrote, read = [], []
    size = 0.0
    for _ in range(3):
        start = time.process_time()
        payload, offsets, sizes = pack(samples, encoding)
        wrote.append(time.process_time() - start)
        size = len(payload) / len(images)
        shard = shard_of("shard.tar", payload, offsets, sizes)
        path = folder / shard.path
        path.write_bytes(payload)
        split = SplitManifest(count=shard.count, shards=(shard,))
        facts = Manifest(
            name="bench", resolution=resolution, channels=3, class_names=("all",), flip=False, splits={"train": split}
        )
        start = time.process_time()
        decode_shard(path, shard.path, shard, facts)
        read.append(time.process_time() - start)
    writing, reading = len(images) / min(wrote), len(images) / min(read)
    return f"| {resolution} | {encoding} | {size:,.0f} | {writing:,.0f} | {reading:,.0f} |"


def main() -> None:
    """Print the table."""
    print("| pixels | encoding | bytes in the shard | written/s | read/s |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for resolution, count in _COUNTS.items():
            images = squares(resolution, count)
            for encoding in ENCODINGS:
                print(measure(resolution, encoding, images, Path(folder)), flush=True)


if __name__ == "__main__":
    main()
