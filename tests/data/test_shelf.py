"""The cache folder keeps to its budget: what was used longest ago goes first, and nothing that is in use."""

import dataclasses
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import shelf
from data.cache import cached_split
from data.errors import DataError
from data.folder import DEFAULT_BUDGET, cache_budget
from data.manifest import Manifest
from data.plan import plan

ROOT = Path(__file__).resolve().parents[2]
BYTES = 12 * (108 + 8) + 2 * 33
"""Of each set below, decoded."""


@pytest.fixture
def manifests(tmp_path: Path, random_samples, write_set) -> list[Manifest]:
    return [write_set(str(tmp_path / str(seed)), random_samples(12, seed=seed)) for seed in range(4)]


def held(tmp_path: Path, manifests: list[Manifest]) -> list[int]:
    """Numbers of the sets that the cache holds."""
    kept = {path.parent.parent.name for path in (tmp_path / "cache").glob("*/*/content")}
    return [number for number, manifest in enumerate(manifests) if manifest.sha256 in kept]


def use(tmp_path: Path, manifests: list[Manifest], number: int, budget: int):
    return cached_split(str(tmp_path / str(number)), manifests[number], "train", tmp_path / "cache", budget)


def test_the_set_used_longest_ago_goes_first(tmp_path: Path, manifests: list[Manifest]) -> None:
    for number in (0, 1, 2, 0):
        use(tmp_path, manifests, number, 3 * BYTES)
    assert held(tmp_path, manifests) == [0, 1, 2]
    use(tmp_path, manifests, 3, 3 * BYTES)
    assert held(tmp_path, manifests) == [0, 2, 3]


def test_a_smaller_budget_is_kept_at_the_next_use(tmp_path: Path, manifests: list[Manifest]) -> None:
    for number in (0, 1, 2):
        use(tmp_path, manifests, number, 3 * BYTES)
    use(tmp_path, manifests, 1, BYTES)
    assert held(tmp_path, manifests) == [1]


def test_a_set_in_use_is_never_removed(
    tmp_path: Path, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "_ROOM_SECONDS", 0.1)
    kept = use(tmp_path, manifests, 0, 2 * BYTES)
    before = np.array(kept.images)
    use(tmp_path, manifests, 1, 2 * BYTES)
    use(tmp_path, manifests, 2, 2 * BYTES)
    assert held(tmp_path, manifests) == [0, 2]
    with pytest.raises(DataError, match=r"no room for 1458 bytes .* in use .* Set BCM_CACHE_BUDGET higher"):
        use(tmp_path, manifests, 1, BYTES)
    assert np.array_equal(kept.images, before)
    del kept
    use(tmp_path, manifests, 1, BYTES)
    assert held(tmp_path, manifests) == [1]


HOLD = """
import sys
from pathlib import Path
from data.cache import cached_split
from data.manifest import load_manifest
cached = cached_split(sys.argv[1], load_manifest(sys.argv[1]), "train", Path(sys.argv[2]), int(sys.argv[3]))
print("held", flush=True)
sys.stdin.read()
"""


def test_a_set_in_use_by_another_process_stays_until_that_is_killed(
    tmp_path: Path, manifests: list[Manifest], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shelf, "_ROOM_SECONDS", 0.1)
    command = [sys.executable, "-c", HOLD, str(tmp_path / "0"), str(tmp_path / "cache"), str(BYTES)]
    other = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT)
    assert other.stdout
    assert other.stdout.readline() == b"held\n"
    with pytest.raises(DataError, match="no room"):
        use(tmp_path, manifests, 1, BYTES)
    other.send_signal(signal.SIGKILL)
    other.communicate()
    use(tmp_path, manifests, 1, BYTES)
    assert held(tmp_path, manifests) == [1]


def test_what_a_kill_left_half_removed_goes_too(tmp_path: Path, manifests: list[Manifest]) -> None:
    use(tmp_path, manifests, 0, BYTES)
    (tmp_path / "cache" / manifests[0].sha256 / "train-decoded").rename(tmp_path / "cache" / ".removed-by-the-dead")
    use(tmp_path, manifests, 1, BYTES)
    assert sorted(path.name for path in (tmp_path / "cache").glob(".*")) == []
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


def test_every_split_has_its_share(manifests: list[Manifest]) -> None:
    part = manifests[0].split("train")
    both = dataclasses.replace(
        manifests[0],
        splits={
            "train": part,
            "test": dataclasses.replace(
                part, shards=tuple(dataclasses.replace(shard, path=f"x/{shard.path}") for shard in part.shards)
            ),
        },
    )
    for split in ("train", "test"):
        assert plan(both, split, 2 * BYTES).resident
        with pytest.raises(DataError, match="too small"):
            plan(both, split, 2 * BYTES - 1)


def test_the_budget_that_is_asked_for_is_enough(manifests: list[Manifest]) -> None:
    with pytest.raises(DataError, match=r"Set BCM_CACHE_BUDGET to \d+ or more") as caught:
        plan(manifests[0], "train", 100)
    needed = int(str(caught.value).split("BUDGET to ")[1].split()[0])
    assert plan(manifests[0], "train", needed)
