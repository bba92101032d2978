"""Counts the functions of ours that a batch touches between `Loader.batch` and the tar.

python -m benchmarks.touched [--list]

The first batch of a set in a local folder, with nothing cached, and a second one: every function of `data` that is
called in any thread, each counted once; comprehensions and lambdas belong to the function they stand in.
"""

import sys
import tempfile
import threading
from pathlib import Path
from types import FrameType

from data.cache import ShardCache
from data.loader import Loader
from data.manifest import load_manifest
from data.order import shuffle_of
from data.prepare import prepare

ROOT = Path(__file__).resolve().parents[1]


def touched(url: str, cache_dir: Path) -> set[tuple[str, str]]:
    """Module and name of each function that two batches of 128 images touch, with nothing cached."""
    manifest = load_manifest(url)
    loader = Loader(
        cache=ShardCache(url, manifest, "train", cache_dir),
        shuffle=shuffle_of(manifest, "train"),
        batch_size=128,
        seed=0,
        rank=0,
        world_size=1,
        flip=True,
        pinned=False,
    )
    calls: set[tuple[str, str]] = set()

    def note(frame: FrameType, event: str, _: object) -> None:
        path = Path(frame.f_code.co_filename)
        if event == "call" and (ROOT / "data") in path.parents and not frame.f_code.co_name.startswith("<"):
            calls.add((str(path.relative_to(ROOT)), frame.f_code.co_qualname))

    threading.setprofile(note)
    sys.setprofile(note)
    try:
        loader.batch(0)
        loader.batch(128)
    finally:
        sys.setprofile(None)
        threading.setprofile(None)
    return calls


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        prepare("digits", None, f"{name}/set", tell=lambda _: None)
        calls = touched(f"{name}/set", Path(name, "cache"))
    modules = sorted({module for module, _ in calls})
    print(f"a batch touches {len(calls)} functions in {len(modules)} modules: {', '.join(modules)}")
    if "--list" in sys.argv:
        print("\n".join(f"  {module}: {name}" for module, name in sorted(calls)))


if __name__ == "__main__":
    main()
