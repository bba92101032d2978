"""The cache folder keeps to its budget: what was used longest ago goes first, and who has it mapped keeps it."""

import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from made import cached_split

from data import cache
from data.cache import DEFAULT_BUDGET, ShardCache, cache_budget
from data.errors import DataError
from data.manifest import Manifest

ROOT = Path(__file__).resolve().parents[2]
BYTES = 12 * (108 + 8) + 2 * 32
"""Of each set below, decoded."""


@pytest.fixture
def manifests(tmp_path: Path, random_samples, write_set) -> list[Manifest]:
    return [write_set(str(tmp_path / str(seed)), random_samples(12, seed=seed)) for seed in range(4)]


def held(tmp_path: Path, manifests: list[Manifest]) -> list[int]:
    """Numbers of the sets that the cache holds whole."""
    opened = [ShardCache(str(tmp_path / str(n)), m, "train", tmp_path / "cache") for n, m in enumerate(manifests)]
    return [number for number, one in enumerate(opened) if all(one._paths[shard].exists() for shard in (0, 1))]


def use(tmp_path: Path, manifests: list[Manifest], number: int, budget: int):
    return cached_split(str(tmp_path / str(number)), manifests[number], "train", tmp_path / "cache", budget)


def test_the_set_used_longest_ago_goes_first(tmp_path: Path, manifests: list[Manifest]) -> None:
    for number in (0, 1, 2, 0):
        use(tmp_path, manifests, number, 3 * BYTES)
    assert held(tmp_path, manifests) == [0, 1, 2]
    use(tmp_path, manifests, 3, 3 * BYTES)
    assert held(tmp_path, manifests) == [0, 2, 3]


def test_a_smaller_budget_is_kept_when_something_is_fetched(tmp_path: Path, manifests: list[Manifest]) -> None:
    for number in (0, 1, 2):
        use(tmp_path, manifests, number, 3 * BYTES)
    use(tmp_path, manifests, 3, BYTES)
    assert held(tmp_path, manifests) == [3]


def test_what_is_removed_stays_with_whoever_has_it_mapped(
    tmp_path: Path, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_LOOK_SECONDS", 0.0)
    first = ShardCache(str(tmp_path / "0"), manifests[0], "train", tmp_path / "cache", BYTES)
    mapped = [first.content(number)[0] for number in (0, 1)]
    before = [np.array(images) for images in mapped]
    use(tmp_path, manifests, 1, BYTES)
    assert held(tmp_path, manifests) == [1]
    assert all(np.array_equal(a, b) for a, b in zip(mapped, before, strict=True))
    # It lets go of them with its next look, and fetches them again.
    assert np.array_equal(first.content(0)[0], before[0])
    assert not first._paths[1].exists() and 1 not in first._open


def test_what_a_process_still_reads_goes_last(
    tmp_path: Path, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "_LOOK_SECONDS", 0.0)
    first = ShardCache(str(tmp_path / "0"), manifests[0], "train", tmp_path / "cache", 2 * BYTES)
    list(first.shards())
    use(tmp_path, manifests, 1, 2 * BYTES)
    list(first.shards())
    use(tmp_path, manifests, 2, 2 * BYTES)
    assert held(tmp_path, manifests) == [0, 2]


DIE = """
import os, sys
from pathlib import Path
from data import cache
from data.manifest import load_manifest
from data.store import transfer
manifest = load_manifest(sys.argv[1])
setattr({"data.cache": cache, "data.store.transfer": transfer}[sys.argv[4]], sys.argv[5], lambda *_: os._exit(9))
opened = cache.ShardCache(sys.argv[1], manifest, "train", Path(sys.argv[2]), int(sys.argv[3]))
opened.content(0)
"""


@pytest.mark.parametrize("following", [0, 1], ids=["the same shard", "another set"])
@pytest.mark.parametrize(
    ("module", "name", "left"),
    [("data.store.transfer", "read_range", ".tmp"), ("data.cache", "read_labels", ".fetched")],
    ids=["while it is fetched", "while it is decoded"],
)
def test_what_a_kill_left_half_made_goes_with_the_next_that_is_made(
    tmp_path: Path, manifests: list[Manifest], module: str, name: str, left: str, following: int
) -> None:
    command = [sys.executable, "-c", DIE, str(tmp_path / "0"), str(tmp_path / "cache"), str(BYTES), module, name]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".partial", left}
    use(tmp_path, manifests, following, BYTES)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".pixels"}
    assert held(tmp_path, manifests) == [following]


def test_removing_what_is_being_made_and_read_is_no_error(tmp_path: Path, write_set, random_samples) -> None:
    samples = random_samples(40)
    manifest = write_set(str(tmp_path / "set"), samples)
    labels = np.array([sample.label for sample in samples])
    until, wrong = time.monotonic() + 2, []

    def read(number: int) -> None:
        opened = ShardCache(str(tmp_path / "set"), manifest, "train", tmp_path / "cache")
        chance = np.random.default_rng(number)
        while time.monotonic() < until:
            ids = chance.permutation(40)
            try:
                if (opened.take(ids)[1] != labels[ids]).any():
                    wrong.append("other labels")
            except DataError as error:
                wrong.append(str(error))
            opened._open.clear()

    readers = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for reader in readers:
        reader.start()
    while time.monotonic() < until:
        for path in (tmp_path / "cache").glob("*.pixels"):
            path.unlink(missing_ok=True)
        time.sleep(0.001)
    for reader in readers:
        reader.join()
    assert wrong == []


def test_a_disk_smaller_than_the_budget_makes_room(
    tmp_path: Path, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for a shard and for the copy that it is made from."""
    copy, room = manifests[0].split("train").shards[0].bytes, 3 * BYTES

    def usage(folder: Path):
        taken = sum(path.stat().st_size for path in folder.glob("*.pixels"))
        return shutil._ntuple_diskusage(room + copy, taken, room + copy - taken)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    for number in range(4):
        use(tmp_path, manifests, number, 10**9)
    assert held(tmp_path, manifests) == [1, 2, 3]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("", DEFAULT_BUDGET),
        ("1000", 1000),
        ("500M", 500 * 2**20),
        ("1.5 TiB", 3 * 2**39),
        ("2gb", 2**31),
        ("8KB", 8192),
    ],
)
def test_the_budget_is_read_from_the_environment(text: str, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCM_CACHE_BUDGET", text)
    assert cache_budget() == size


@pytest.mark.parametrize("text", ["0", "-5G", "much", "5 lakh", "1e9"])
def test_a_budget_that_is_no_size_is_refused(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BCM_CACHE_BUDGET", text)
    with pytest.raises(DataError, match="BCM_CACHE_BUDGET is"):
        cache_budget()


def test_a_budget_below_three_shards_is_refused_and_the_one_it_names_is_enough(
    tmp_path: Path, write_set, random_samples
):
    manifest = write_set(str(tmp_path / "set"), random_samples(30))
    with pytest.raises(DataError, match=r"Set BCM_CACHE_BUDGET to \d+ or more") as caught:
        ShardCache(str(tmp_path / "set"), manifest, "train", tmp_path / "cache", 100)
    needed = int(str(caught.value).split("BUDGET to ")[1].split()[0])
    assert cached_split(str(tmp_path / "set"), manifest, "train", tmp_path / "cache", needed).labels.shape == (30,)


@pytest.mark.parametrize("images", [10, 20])
def test_a_set_of_few_shards_that_cannot_fit_is_refused_at_once(tmp_path: Path, write_set, random_samples, images: int):
    manifest = write_set(str(tmp_path / "set"), random_samples(images))
    needed = images * (108 + 8) + images // 10 * 32
    with pytest.raises(
        DataError, match=f"its {images // 10} largest shards must fit. Set BCM_CACHE_BUDGET to {needed}"
    ):
        ShardCache(str(tmp_path / "set"), manifest, "train", tmp_path / "cache", needed - 1)
    ShardCache(str(tmp_path / "set"), manifest, "train", tmp_path / "cache", needed)
