"""Measures `prepare`: CPU time against another checkout, peak memory with two tasks, and `verify` of CIFAR-10.

python -m benchmarks.prepare --before ../before --cifar10 ../shared/datasets/cifar-10-python.tar.xz

`--before` is a checkout of the code to compare with, for example made by `git archive COMMIT | tar -x -C ../before`.
The sources are made: photographs that come with scikit-learn, cut at random places, as 128 px PNG files (like FFHQ's
thumbnails), as JPEG files of 500x375 in class folders (like ImageNet), in an lmdb (like LSUN), and as tars. Each is
prepared at 64 px by fresh processes of both checkouts in turn, one shard after the other; the best of several runs of
each counts. Peak memory is the proportional share (PSS) of the command and its tasks, sampled while it runs on Ray;
that of Ray's own daemons is printed beside it.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import lmdb
import numpy as np
import psutil
from PIL import Image
from sklearn.datasets import load_sample_images

ROOT = Path(__file__).resolve().parents[1]
RESOLUTION = 64
ALLOWED_SECONDS, ALLOWED_MEMORY = 1.1, 2**30
RUN = f"""
import json, sys, time
import sklearn.datasets, webdataset.writer  # so that their import is not timed
from data.prepare import Choices, prepare
own = dict(resolution={RESOLUTION}) if sys.argv[1] == "mine" else {{}}
rewrite = sys.argv[4] == "rewrite"
start = time.process_time()
choices = Choices(rewrite=rewrite, **own)
made = prepare(sys.argv[1], sys.argv[2] or None, sys.argv[3], choices=choices, tell=lambda text: None)
count = sum(part.count for part in made.splits.values())
print(json.dumps([time.process_time() - start, count, made.sha256]))
"""


def photographs(count: int, width: int, height: int, form: str) -> Iterator[bytes]:
    """Image files cut from two photographs."""
    chance = np.random.default_rng(0)
    bunch: Any = load_sample_images()
    for number in range(count):
        photo = np.asarray(bunch.images[number % 2], np.uint8)
        top, left = chance.integers(0, photo.shape[0] - height + 1), chance.integers(0, photo.shape[1] - width + 1)
        buffer = io.BytesIO()
        Image.fromarray(photo[top : top + height, left : left + width]).save(buffer, form)
        yield buffer.getvalue()


def sources(folder: Path, scale: int) -> dict[str, tuple[str, str, str]]:
    """Name, source and whether to rewrite, of each set that is prepared."""
    for number, payload in enumerate(photographs(2 * scale, 128, 128, "PNG")):
        _write(folder / "ffhq" / f"{number // 1000:05d}" / f"{number:05d}.png", payload)
    for number, payload in enumerate(photographs(scale, 500, 375, "JPEG")):
        _write(folder / "imagenet" / f"n{number % 10:08d}" / f"{number:06d}.JPEG", payload)
    (folder / "lsun" / "x_train_lmdb").mkdir(parents=True)
    with (
        lmdb.open(str(folder / "lsun" / "x_train_lmdb"), map_size=2**32) as environment,
        environment.begin(write=True) as database,
    ):
        for number, payload in enumerate(photographs(scale, 341, 256, "WEBP")):
            database.put(b"%08d" % number, payload)
    for name, files in (
        ("rewritten", photographs(2 * scale, 128, 128, "JPEG")),
        ("kept", photographs(4 * scale, RESOLUTION, RESOLUTION, "PNG")),
    ):
        (folder / name).mkdir()
        with tarfile.open(folder / name / "a.tar", "w") as archive:
            for number, payload in enumerate(files):
                member = tarfile.TarInfo(f"{number:06d}.{'jpg' if name == 'rewritten' else 'png'}")
                member.size = len(payload)
                archive.addfile(member, io.BytesIO(payload))
    return {
        "digits": ("digits", "", ""),
        "like FFHQ (PNG, 128 px)": ("ffhq64", str(folder / "ffhq"), ""),
        "like ImageNet (JPEG, 500x375)": ("mine", str(folder / "imagenet"), ""),
        "like LSUN (lmdb, WebP, 341x256)": ("mine", str(folder / "lsun"), ""),
        "tars, written anew (JPEG, 128 px)": ("mine", str(folder / "rewritten"), "rewrite"),
        "tars, as they lie (PNG, 64 px)": ("mine", str(folder / "kept"), ""),
    }


def _write(path: Path, payload: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(payload)


def seconds(checkout: Path, arguments: tuple[str, str, str], scratch: Path) -> tuple[float, int, str]:
    """CPU seconds of one run, images written, and the hash of the set."""
    name, source, rewrite = arguments
    with tempfile.TemporaryDirectory(dir=scratch) as to:
        command = [sys.executable, "-c", RUN, name, source, to, rewrite]
        environment = os.environ | {"PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True, check=True)
    took, count, digest = json.loads(done.stdout)
    return took, count, digest


def peak(arguments: list[str], scratch: Path) -> tuple[float, int, int]:
    """Seconds of a command, peak bytes of it with its tasks, and peak bytes of Ray's daemons."""
    command = [sys.executable, "-m", "pipelines.prepare", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    start, own, daemons = time.monotonic(), 0, 0
    with subprocess.Popen(command, cwd=scratch, env=environment, stdout=subprocess.DEVNULL) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            sizes = {True: 0, False: 0}
            for each in [tree, *_children(tree)]:
                with suppress(psutil.Error, IndexError):
                    # A task's process calls itself ray::WHAT, a daemon's ray::SOMEAgent or something else.
                    title = each.cmdline()[0].strip()
                    ours = each.pid == tree.pid or (title.startswith("ray::") and not title.endswith("Agent"))
                    sizes[ours] += each.memory_full_info().pss
            own, daemons = max(own, sizes[True]), max(daemons, sizes[False])
            time.sleep(0.05)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} failed")
    return time.monotonic() - start, own, daemons


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.Error:
        return []


def main() -> None:
    """Print the tables; exit code 1 if a limit is passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, required=True, help="checkout of the code to compare with")
    parser.add_argument("--cifar10", required=True, help="the CIFAR-10 archive")
    parser.add_argument("--scale", type=int, default=1500, help="images of a set")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    passed: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        sets = sources(scratch / "in", options.scale)
        sets["CIFAR-10"] = ("cifar10", str(Path(options.cifar10).resolve()), "")
        print("| set | images | CPU s before | CPU s now | ratio |\n|---|---|---|---|---|")
        for title, arguments in sets.items():
            runs = [
                [seconds(checkout, arguments, scratch) for checkout in (options.before.resolve(), ROOT)]
                for _ in range(options.rounds)
            ]
            before, now = (min(run[place][0] for run in runs) for place in (0, 1))
            print(f"| {title} | {runs[0][1][1]:,} | {before:.2f} | {now:.2f} | {now / before:.2f} |", flush=True)
            passed += [f"{title}: {now / before:.2f} times the CPU time"] if now > ALLOWED_SECONDS * before else []
            passed += [] if len({digest for run in runs for *_, digest in run}) == 1 else [f"{title}: other bytes"]
        print("\n| command | s | MiB of it and its tasks | MiB of Ray's daemons |\n|---|---|---|---|")
        commands = {
            title: [name, *(["--source", source] if source else []), *([f"--{rewrite}"] if rewrite else [])]
            + (["--resolution", str(RESOLUTION)] if name == "mine" else [])
            + ["--to", str(scratch / name / str(place))]
            + ([] if source.endswith("kept") else ["--samples-per-shard", "100"])
            for place, (title, (name, source, rewrite)) in enumerate(sets.items())
        }
        commands["verify CIFAR-10"] = ["verify", commands["CIFAR-10"][commands["CIFAR-10"].index("--to") + 1]]
        for title, line in commands.items():
            took, own, daemons = peak(line, scratch)
            print(f"| {title} | {took:.1f} | {own / 2**20:.0f} | {daemons / 2**20:.0f} |", flush=True)
            passed += [f"{title}: {own / 2**20:.0f} MiB"] if own > ALLOWED_MEMORY else []
            passed += [f"{title}: {took:.0f} s"] if title.startswith("verify") and took > 30 else []
    if passed:
        raise SystemExit("beyond the limit: " + "; ".join(passed))


if __name__ == "__main__":
    main()
