"""The cache folder keeps to its budget: what was used longest ago goes first, and who has it mapped keeps it."""

import subprocess
import sys
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
    mapped = [first.shard(number)[0] for number in (0, 1)]
    before = [np.array(images) for images in mapped]
    use(tmp_path, manifests, 1, BYTES)
    assert held(tmp_path, manifests) == [1]
    assert all(np.array_equal(a, b) for a, b in zip(mapped, before, strict=True))
    # It lets go of them with its next look, and fetches them again.
    assert np.array_equal(first.shard(0)[0], before[0])
    assert not first._paths[1].exists() and 1 not in first._open


DIE = """
import os, sys
from pathlib import Path
from data import cache
from data.manifest import load_manifest
cache.read_labels = lambda *_: os._exit(9)
opened = cache.ShardCache(sys.argv[1], load_manifest(sys.argv[1]), "train", Path(sys.argv[2]), int(sys.argv[3]))
opened.shard(0)
"""


def test_what_a_kill_left_half_made_goes_with_the_next_that_is_made(tmp_path: Path, manifests: list[Manifest]) -> None:
    command = [sys.executable, "-c", DIE, str(tmp_path / "0"), str(tmp_path / "cache"), str(BYTES)]
    assert subprocess.run(command, cwd=ROOT, check=False).returncode == 9
    left = {path.suffix for path in (tmp_path / "cache").iterdir()}
    assert left == {"", ".partial", ".fetched"}
    use(tmp_path, manifests, 1, BYTES)
    assert {path.suffix for path in (tmp_path / "cache").iterdir()} == {"", ".pixels"}
    assert held(tmp_path, manifests) == [1]


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
