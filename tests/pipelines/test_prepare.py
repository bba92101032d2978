"""The command: prepare, verify, inspect; in parallel on Ray, and killed while it is."""

import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from world import Command

from data.prepare import Choices, prepare

ROOT = Path(__file__).resolve().parents[2]


def fill(folder: Path, count: int, side: int = 12) -> Path:
    for number, image in enumerate(np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)):
        path = folder / ("cat" if number % 3 else "dog") / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_is_prepared_verified_and_inspected(command: Command, tmp_path: Path) -> None:
    source, place, out = fill(tmp_path / "in", 40), tmp_path / "set", tmp_path / "sheet.png"
    done = command("prepare", "pets", "--source", str(source), "--to", str(place), "--resolution", "8", "--flip")
    assert (done.code, done.err) == (0, "")
    assert "train 36/36" in done.out and "test   " in done.out and "4 images in 1 shards" in done.out
    assert (
        "every byte is as the manifest says, and every image can be decoded"
        in command("prepare", "verify", str(place)).out
    )
    seen = command("prepare", "inspect", str(place), "--out", str(out))
    assert "8x8, 3 channels; mirroring allowed; 2 classes" in seen.out
    counts = {line.split()[0]: 0 for line in seen.out.splitlines() if line.startswith(("  cat", "  dog"))}
    for line in seen.out.splitlines():
        if line.split()[:1] and line.split()[0] in counts:
            counts[line.split()[0]] += int(line.split()[1])
    assert counts == {"cat": 26, "dog": 14}
    with Image.open(out) as sheet:
        assert sheet.size == (20 * 8, 2 * 8)


def test_damage_is_listed_by_verify_and_inspect(command: Command, tmp_path: Path) -> None:
    place = tmp_path / "set"
    prepare("pets", str(fill(tmp_path / "in", 20)), str(place), choices=Choices(resolution=8, samples_per_shard=6))
    whole = (place / "train-000001.tar").read_bytes()
    (place / "train-000001.tar").write_bytes(whole[:-1] + b"x")
    (place / "test-000000.tar").unlink()
    for form in ("verify", "inspect"):
        error = command("prepare", form, str(place)).error
        assert f"2 shards of {place} are not as its manifest says" in error
        assert f"{place}/train-000001.tar is damaged" in error and f"{place}/test-000000.tar" in error
    assert "there is no data set at" in command("prepare", "verify", str(tmp_path / "nothing")).error


def test_an_image_that_was_cut_off_in_a_tar_is_found_by_verify(command: Command, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    with tarfile.open(tmp_path / "in" / "a.tar", "w") as archive:
        for number in range(6):
            buffer = io.BytesIO()
            image = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(image).save(buffer, format="JPEG")
            payload = buffer.getvalue()[: -200 if number in (2, 4) else None]
            member = tarfile.TarInfo(f"{number}.jpg")
            member.size = len(payload)
            archive.addfile(member, io.BytesIO(payload))
    place = str(tmp_path / "set")
    assert command("prepare", "mine", "--source", str(tmp_path / "in"), "--to", place).code == 0
    assert "every byte is as the manifest says" in command("prepare", "verify", place, "--bytes-only").out
    for form in ("verify", "inspect"):
        error = command("prepare", form, place).error
        assert all(f"{tmp_path}/in/a.tar: sample {number}: " in error for number in (2, 4))
        assert "--rewrite --resolution 64 --skip-bad 2" in error
    options = ("--source", str(tmp_path / "in"), "--rewrite", "--resolution", "64", "--skip-bad", "2")
    assert command("prepare", "mine", *options, "--to", f"{place}-anew").code == 0
    assert "every image can be decoded" in command("prepare", "verify", f"{place}-anew").out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("prepare pets --source {in}", "give their --resolution"),
        ("prepare ffhq64", "ffhq64 needs a source, the path or URL of its images: FFHQ"),
        ("prepare pets --source {in} --resolution 8 --samples-per-shard 0", "give at least 1"),
        ("prepare pets --source {in} --resolution 8 --encoding jpg", "choose from raw, png, webp"),
        ("prepare pets --source {in} --resolution 8 --channels 2", "give 1 (grey) or 3 (RGB)"),
        ("prepare pets --source {in}/none --resolution 8", "no files at"),
        ("prepare pets --source {in} --resolution 8 --skip-bad many", "neither a number of images"),
        ("prepare pets --source {in} --resolution 8 --fit edm-imagenet64", "is a form of 64 px, not 8"),
        ("prepare pets --source {in} --resolution 8 --rewrite", "--rewrite has no effect on a folder of images"),
    ],
)
def test_wrong_requests_are_explained(command: Command, tmp_path: Path, line: str, said: str) -> None:
    fill(tmp_path / "in", 3)
    assert said in command(*line.format(**{"in": tmp_path / "in"}).split(), "--to", str(tmp_path / "set")).error
    assert not (tmp_path / "set").exists()


@pytest.mark.slow
def test_tasks_killed_with_their_driver_leave_nothing_that_matters(tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 300, side=60)
    bad = source / "dog" / "0003.png"
    good, times = bad.read_bytes(), bad.stat()
    prepare("pets", str(source), str(tmp_path / "alone"), choices=Choices(resolution=50, samples_per_shard=3))
    bad.write_bytes(b"none")
    arguments = ["pets", "--source", str(source), "--resolution", "50", "--samples-per-shard", "3", "--to", "set"]
    command = [sys.executable, "-m", "pipelines.prepare", *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and len(list(tmp_path.glob("set/*.tar"))) < 20:
            time.sleep(0.005)
        assert process.poll() is None, "it ended before it was killed"
        process.send_signal(signal.SIGKILL)
    # Its workers end at once; what they still write is the same.
    failed = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert failed.returncode == 2 and "1 images of the source cannot be used" in failed.stderr, failed
    assert "dog/0003.png: no readable" in failed.stderr and "Traceback" not in failed.stderr
    bad.write_bytes(good)
    os.utime(bad, ns=(times.st_atime_ns, times.st_mtime_ns))
    # One shard is left to write, which needs no Ray.
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert content(tmp_path / "set") == content(tmp_path / "alone")


def test_what_a_set_is_made_of_is_printed(command: Command, tmp_path: Path) -> None:
    line = ["prepare", "pets", "--source", str(fill(tmp_path / "in", 40)), "--resolution", "8", "--to"]
    looked, made = command(*line, str(tmp_path / "set"), "--dry-run"), command(*line, str(tmp_path / "set"))
    for done in (looked, made):
        assert (done.code, done.err) == (0, "")
        counts = dict(re.findall(r"^(train|test) +(\d+) images, 2 classes: cat \d+, dog \d+$", done.out, re.MULTILINE))
        assert counts == {"train": "36", "test": "4"}
        assert sum(map(int, re.findall(r"cat (\d+)", done.out))) == 26
        assert "labels: the folders the images lie in" in done.out
    # Four images of 8 px and their labels are 40 blocks of 512 bytes and what a tar adds.
    assert re.search(
        rf"would write 2 shards, 8x8 px, RGB, raw, about 0\.\d MB, to {tmp_path}/set: in about \d+ s", looked.out
    )
    assert "this set already" in command(*line, str(tmp_path / "set"), "--dry-run").out


def test_a_dry_run_writes_nothing_and_tries_the_place_and_the_first_images(command: Command, tmp_path: Path) -> None:
    source = fill(tmp_path / "in", 5)
    line = ["prepare", "pets", "--source", str(source), "--resolution", "8", "--dry-run", "--to"]
    before = content_of(tmp_path)
    assert command(*line, str(tmp_path / "deep" / "set")).code == 0
    assert content_of(tmp_path) == before
    (tmp_path / "file").write_bytes(b"")
    assert f"cannot write to {tmp_path}/file" in command(*line, str(tmp_path / "file" / "set")).error
    for path in source.rglob("*.png"):
        path.write_bytes(b"<html>404</html>")
    assert ".png: no readable" in command(*line, str(tmp_path / "set")).error
    assert (
        "fewer than 16x16"
        in command(
            "prepare",
            "pets",
            "--source",
            str(fill(tmp_path / "in", 5)),
            "--resolution",
            "16",
            "--dry-run",
            "--to",
            str(tmp_path / "set"),
        ).error
    )


def content_of(folder: Path) -> set[tuple[Path, int]]:
    return {(path, path.stat().st_size) for path in folder.rglob("*")}
