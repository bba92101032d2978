"""Foreign weights become models of ours whole, or not at all."""

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from foreign import ADM, BCM, EDM, ICT, NCSNPP, Golden, golden, imported, write_npz
from safetensors.torch import save_file
from world import Command

from bcm import inference
from bcm.checkpoint import attachment, load_model
from bcm.timesteps import CONSISTENCY_CIFAR10, CONSISTENCY_IMAGENET64, PAPER_IMAGENET64, TimeSteps
from data import store
from pipelines.models.foreign import ORIGIN
from pipelines.models.source import model_at

# ---- what becomes of a file


@pytest.mark.parametrize(
    ("name", "options", "objective", "schedules"),
    [
        (ICT, ADM, "ct", CONSISTENCY_IMAGENET64),
        (BCM, ADM, "bct", PAPER_IMAGENET64),
        (NCSNPP, EDM, "edm", CONSISTENCY_CIFAR10),
        (NCSNPP, (*EDM, "--objective", "ct"), "ct", CONSISTENCY_CIFAR10),
    ],
)
def test_an_imported_network_computes_what_the_foreign_one_did(
    command: Command,
    shared: Path,
    tmp_path: Path,
    name: str,
    options: tuple[str, ...],
    objective: str,
    schedules: dict[str, TimeSteps],
):
    known = golden(shared, name)
    torch.save(known.state, tmp_path / "weights.pt")
    to = imported(command, tmp_path / "weights.pt", options)
    toolkit = model_at(to).open()
    torch.testing.assert_close(
        toolkit.model.F_theta(known.x, known.t, known.u, known.label), known.F, rtol=0, atol=1e-5
    )
    assert (toolkit.schedules, toolkit.denoiser) == (schedules, objective == "edm")
    origin = json.loads(attachment(Path(to), ORIGIN))
    assert origin["sha256"] == hashlib.sha256((tmp_path / "weights.pt").read_bytes()).hexdigest()
    assert (origin["objective"], origin["source"], origin["left_out"]) == (objective, options[1], [])


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.safetensors", save_file),
        ("w.npz", write_npz),
        ("w.pth", lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False)),
        ("w.pt", lambda state, path: torch.save({f"module.{name}": value for name, value in state.items()}, path)),
    ],
)
def test_every_kind_of_file_gives_the_same_weights(
    command: Command, file: Path, ict: Golden, tmp_path: Path, name: str, write: Callable[[Any, Path], Any]
):
    first = load_model(Path(imported(command, file)))[0].state_dict()
    (tmp_path / "other").mkdir()
    write(ict.state, tmp_path / "other" / name)
    second = load_model(Path(imported(command, tmp_path / "other" / name)))[0].state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_file_and_model_may_be_at_any_url(command: Command, file: Path):
    store.write_bytes("memory://weights/ict.pt", file.read_bytes())
    outcome = command("import_weights", "memory://weights/ict.pt", *ADM, "--to", "memory://models/ict")
    assert outcome.code == 0, outcome
    toolkit = model_at("memory://models/ict").open()
    assert inference.generate(toolkit, [0], 2, [3]).shape == (1, 3, 16, 16)


def test_a_dry_run_shows_every_tensor_and_writes_nothing(command: Command, file: Path, ict: Golden, tmp_path: Path):
    outcome = command("import_weights", str(file), *ADM, "--to", str(tmp_path / "new"), "--dry-run")
    assert (outcome.code, outcome.err) == (0, "")
    count = sum(value.numel() for value in ict.state.values())
    assert "objective ct" in outcome.out and f"{count:,} numbers, all fit" in outcome.out
    assert "encoder.0.blocks.0.conv0.weight (32, 32, 3, 3)" in outcome.out
    assert f"would write it to {tmp_path}/new, with sample-1, sample-2" in outcome.out
    assert {path.name for path in tmp_path.iterdir()} == {file.name}


# ---- what does not fit


def without(state: dict[str, Any]) -> None:
    del state["out.2.bias"]


def with_one_more(state: dict[str, Any]) -> None:
    state["ema_step"] = torch.zeros(3)


def wider(state: dict[str, Any]) -> None:
    state["out.2.bias"] = torch.zeros(4)


def nested(state: dict[str, Any]) -> None:
    state["optimizer"] = {"lr": 0.1}


def broken(state: dict[str, Any]) -> None:
    state["out.2.bias"] = torch.tensor([0.0, torch.nan, 0.0])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without, "1 missing (out.2.bias)"),
        (with_one_more, "1 surplus (ema_step)"),
        (wider, "1 of another shape (out.2.bias (4,), not (3,))"),
        (nested, "the entry 'optimizer' is no tensor but dict. Save the state dict alone"),
        (broken, "the tensor out.2.bias holds values that are not finite"),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_written(
    command: Command, ict: Golden, tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
):
    change(ict.state)
    torch.save(ict.state, tmp_path / "weights.pt")
    assert said in command("import_weights", str(tmp_path / "weights.pt"), *ADM, "--to", str(tmp_path / "new")).error
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--network", "imagenet64-bcm"), "the tensors are not those of this network"),
        (("--network", "imagenet64-bcn"), "did you mean 'imagenet64-bcm"),
        (("--network-options", "resolution=16", "head_channels=48"), "head_channels is 48"),
        (("--network-options", "resolution=16", "head_channel=16"), "'head_channel'; did you mean 'head_channels'"),
        (("--network-options", "resolution=big"), "--network-options resolution=big"),
        (("--source", "edm-ncsnpp"), "the tensors are not those of a network as edm-ncsnpp has it"),
    ],
)
def test_a_wrong_network_or_source_is_explained(
    command: Command, file: Path, tmp_path: Path, options: tuple[str, ...], said: str
):
    arguments = ("--source", "official-imagenet64", *options, "--to", str(tmp_path / "new"))
    assert said in command("import_weights", str(file), *arguments).error
    assert not (tmp_path / "new").exists()


def test_an_unknown_source_lists_the_known_ones(command: Command, tmp_path: Path):
    outcome = command("import_weights", "w.pt", "--source", "edm", "--to", str(tmp_path / "new"))
    assert outcome.code == 2 and "unknown --source 'edm': Known:" in outcome.err


def test_objectives_are_for_networks_of_one_time(command: Command, shared: Path, tmp_path: Path):
    torch.save(golden(shared, BCM).state, tmp_path / "bcm.pt")
    line = (str(tmp_path / "bcm.pt"), *ADM, "--objective", "ct", "--to", str(tmp_path / "new"))
    assert "--objective ct is for networks of one time; this one has two" in command("import_weights", *line).error


def test_nothing_is_written_where_something_is(command: Command, file: Path, tmp_path: Path):
    to = imported(command, file)
    error = command("import_weights", str(file), *ADM, "--to", to).error
    assert error == f"{to} is not empty. Give --to another folder."


# ---- files that are damaged, or worse


class Evil:
    """What an attacker would put in a checkpoint: unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_with_code_is_refused_and_does_not_run(command: Command, ict: Golden, tmp_path: Path, zipped: bool):
    victim = tmp_path / "victim"
    payload = {**ict.state, "hook": Evil(victim)}
    torch.save(payload, tmp_path / "evil.pt", _use_new_zipfile_serialization=zipped)
    error = command("import_weights", str(tmp_path / "evil.pt"), *ADM, "--to", str(tmp_path / "new")).error
    assert "evil.pt is a pickle of more than tensors: to load it would run code of its author (posix.mkdir)" in error
    assert "weights_only" not in error  # torch's own advice is to let it run
    assert "torch.save(network.state_dict()" in error
    assert not victim.exists() and not (tmp_path / "new").exists()
    os.mkdir(victim)  # the payload itself works: it is the loader that refuses it


def test_an_array_of_objects_is_refused_and_does_not_run(command: Command, tmp_path: Path):
    victim = tmp_path / "victim"
    np.savez(tmp_path / "evil.npz", np.array([Evil(victim)], dtype=object))
    error = command("import_weights", str(tmp_path / "evil.npz"), *ADM, "--to", str(tmp_path / "new")).error
    assert "evil.npz cannot be read as .npz" in error and "allow_pickle=False" in error
    assert not victim.exists()


@pytest.mark.parametrize("suffix", [".pt", ".npz", ".safetensors"])
@pytest.mark.parametrize("length", [0, 10, 20_000])
def test_a_truncated_file_is_named(command: Command, ict: Golden, tmp_path: Path, suffix: str, length: int):
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pt":
        torch.save(ict.state, path)
    elif suffix == ".npz":
        write_npz(ict.state, path)
    else:
        save_file(ict.state, path)
    path.write_bytes(path.read_bytes()[:length])
    error = command("import_weights", str(path), *ADM, "--to", str(tmp_path / "new")).error
    assert f"cut{suffix} cannot be read as {suffix}" in error and "Fetch it again" in error


@pytest.mark.parametrize("content", [b"hello world" * 100, b"\x80\x04\x95" + bytes(range(256))])
def test_a_file_of_another_kind_is_named(command: Command, tmp_path: Path, content: bytes):
    (tmp_path / "w.pt").write_bytes(content)
    error = command("import_weights", str(tmp_path / "w.pt"), *ADM, "--to", str(tmp_path / "new")).error
    assert "w.pt cannot be read as .pt" in error and "weights_only" not in error


def test_files_that_are_not_there_or_of_another_kind_are_named(command: Command, tmp_path: Path):
    line = (*ADM, "--to", str(tmp_path / "new"))
    assert f"there is no file {tmp_path}/no.pt" in command("import_weights", f"{tmp_path}/no.pt", *line).error
    assert "cannot read memory://no.pt" in command("import_weights", "memory://no.pt", *line).error
    (tmp_path / "net.pkl").write_bytes(b"")
    assert (
        "net.pkl is of an unknown kind; known are .pt" in command("import_weights", f"{tmp_path}/net.pkl", *line).error
    )
