"""A batch touches few functions of ours between the loader and the tar."""

from pathlib import Path

from benchmarks.touched import touched


def test_a_batch_touches_few_functions_and_modules(tmp_path: Path, random_samples, write_set) -> None:
    write_set(str(tmp_path / "set"), random_samples(300), samples_per_shard=100)
    calls = touched(str(tmp_path / "set"), tmp_path / "cache")
    assert {("data/loader.py", "Loader.batch"), ("data/cache.py", "ShardCache.take")} <= calls
    assert any(module == "data/tar.py" for module, _ in calls)
    assert len(calls) <= 40
    assert len({module for module, _ in calls}) <= 8
