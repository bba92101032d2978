"""The order in which a checkpoint goes to storage."""

from pathlib import Path

import pytest

from bcm.checkpoint import INDEX
from data import store
from pipelines.models import checkpoints


def test_an_upload_is_no_checkpoint_before_its_last_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    files = {name: name for name in ("a", INDEX, "zebra")}
    folder, run = tmp_path / "made", tmp_path / "run"
    folder.mkdir()
    for name in files:
        (folder / name).write_text(name)
    found: list[list[str]] = []
    write = store.write_bytes

    def seen(url: str, content: bytes) -> None:
        found.append(checkpoints.checkpoints(str(run)))
        write(url, content)

    monkeypatch.setattr(store, "write_bytes", seen)
    name = checkpoints.checkpoint_name(3)
    checkpoints.upload(folder, str(run / name))
    assert found == [[], [], []] and checkpoints.checkpoints(str(run)) == [name]
    assert {path.name: path.read_text() for path in (run / name).iterdir()} == files
