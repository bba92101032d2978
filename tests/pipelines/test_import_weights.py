"""Foreign weights become models of ours whole, or not at all."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from foreign import Golden, golden, write_shards
from mlflow.exceptions import MlflowException
from safetensors.torch import save_file
from servers import served_model
from world import Command, World

from bcm import inference
from bcm.checkpoint import INDEX, attachment, load_model
from bcm.timesteps import CONSISTENCY_CIFAR10, CONSISTENCY_IMAGENET64, PAPER_IMAGENET64, TimeSteps
from data import store
from pipelines.evaluation.scores import Score, Scores, write_scores
from pipelines.models.foreign import ORIGIN
from pipelines.models.source import model_at
from pipelines.recipes import recipe
from pipelines.training.checks import open_initial

ADM = ("--source", "official-imagenet64", "--network-options", "resolution=16", "head_channels=16")
EDM = ("--source", "edm-ncsnpp")
ICT, BCM, NCSNPP = "adm_ict_tiny", "adm_bcm_tiny", "ncsnpp_tiny"


@pytest.fixture
def ict(shared: Path) -> Golden:
    return golden(shared, ICT)


@pytest.fixture
def file(ict: Golden, tmp_path: Path) -> Path:
    """The weights of a consistency model as their authors save them."""
    torch.save(ict.state, tmp_path / "ict.pt")
    return tmp_path / "ict.pt"


def write_npz(state: dict[str, torch.Tensor], path: Path) -> None:
    np.savez(path, allow_pickle=False, **{name: value.numpy() for name, value in state.items()})


def imported(command: Command, path: Path, options: tuple[str, ...] = ADM) -> str:
    """The folder of the model that the command makes of a file."""
    to = str(path.with_name("imported"))
    outcome = command("import_weights", str(path), *options, "--to", to)
    assert outcome.code == 0, outcome
    return to


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


# ---- what the other commands make of it


def test_an_imported_consistency_model_is_drawn_and_says_what_it_cannot(command: Command, file: Path, tmp_path: Path):
    to, out = imported(command, file), str(tmp_path / "x.png")
    for line in (
        ("sample", to, "--nfe", "2", "--label", "3"),
        ("sample", to, "--nfe", "1"),
        ("sample", to, "--task", "all"),
    ):
        assert command(*line, "--count", "2", "--out", out).code == 0
        Path(out).unlink()
    assert "needs one label in [0, 10)" in command("sample", to, "--label", "10", "--out", out).error
    assert "no time steps 'sample-4'; it has sample-1, sample-2" in command("sample", to, "--nfe", "4").error
    assert "has no inverse direction" in command("sample", to, "--task", "invert", "--out", out).error
    assert f"{to} does not say where its data is; give --data" in command("evaluate", to).error
    assert f"{to} is no training run, and there is none to search on" in command("tune", to).error
    assert not Path(out).exists()


def test_an_imported_bidirectional_model_inverts(command: Command, shared: Path, tmp_path: Path):
    torch.save(golden(shared, BCM).state, tmp_path / "bcm.pt")
    to, data = imported(command, tmp_path / "bcm.pt"), str(tmp_path / "data")
    write_shards(data)
    outcome = command("evaluate", to, "--data", data, "--dry-run")
    assert f"would measure {to} after 0 steps with sample-1, sample-2, sample-3, sample-4, invert-1" in outcome.out
    line = ("sample", to, "--task", "invert", "--nfe", "1", "--count", "2", "--data", data)
    assert command(*line, "--out", str(tmp_path / "x.png")).code == 0


def test_an_imported_consistency_model_is_fine_tuned_from(command: Command, file: Path, ict: Golden):
    to, config = imported(command, file), recipe("imagenet64-bcm", smoke=True)
    network = replace(model_at(to).open().network, times=2, dropout=0.2)
    initial = open_initial(to, replace(config, network=network))
    to_0 = torch.full_like(ict.t, 0.002)
    expected = model_at(to).open().model(ict.x, ict.t, to_0, ict.label)
    torch.testing.assert_close(initial.model.eval()(ict.x, ict.t, to_0, ict.label), expected)


def test_an_imported_denoiser_samples_nowhere(command: Command, shared: Path, tmp_path: Path):
    torch.save(golden(shared, NCSNPP).state, tmp_path / "edm.pt")
    to = imported(command, tmp_path / "edm.pt", EDM)
    write_shards(str(tmp_path / "data"))
    for line in (("sample", to), ("sample", to, "--task", "all"), ("evaluate", to, "--data", str(tmp_path / "data"))):
        assert "this model is a denoiser (objective edm)" in command(*line).error
    line = (str(tmp_path / "edm.pt"), *EDM, "--to", str(tmp_path / "new"), "--register", "edm")
    assert "this model is a denoiser" in command("import_weights", *line).error
    assert not (tmp_path / "new").exists()


def test_an_imported_model_is_registered_at_once_or_with_its_scores(command: Command, world: World, file: Path):
    to = str(world.root / "imported")
    outcome = command("import_weights", str(file), *ADM, "--to", to, "--register", "ict")
    assert outcome.out.endswith("ict version 1: ict had no champion\n"), outcome
    assert f"imported has no scores yet. Run `python -m pipelines.evaluate {to}`" in command("register", to).error
    steps = model_at(to).schedules()
    conditions: dict[str, Any] = {"error": None, "count": 10, "seeds": None, "extractor": "pixels", "steps": None}
    rows = (
        Score(metric="fd-pixels", task="real", nfe=0, value=2.0, **conditions),
        Score(metric="fd-pixels", task="sample", nfe=1, value=3.0, **conditions),
    )
    write_scores(to, Scores(k=0, ema_rate=None, schedules=steps, rows=rows))
    assert "has no recipe to be named after; give --name" in command("register", to).error
    outcome = command("register", to, "--name", "ict")
    assert outcome.out == "ict version 2: the champion, version 1, was never scored\n"
    toolkit = model_at("models:/ict@champion").open()
    assert toolkit.schedules == steps == CONSISTENCY_IMAGENET64
    served = served_model(world.mlflow, "ict")
    rows = pd.DataFrame({"seed": [1, 2], "label": [0, 9]})
    assert len(served.predict(rows, params={"task": "generate", "nfe": 2})["image"]) == 2
    for wrong, params, said in (
        (rows.assign(label=[0, 10]), {"task": "generate"}, "needs one label in"),
        (rows[["seed"]], {"task": "generate"}, "needs one label in"),
        (rows, {"task": "invert"}, "no inverse direction"),
    ):
        with pytest.raises(MlflowException, match=said):
            served.predict(wrong, params=params)


def test_a_damaged_import_is_named(command: Command, file: Path):
    to = imported(command, file)
    (Path(to) / INDEX).write_text('{"k": 0}')
    assert f"{to}/{INDEX}: missing key 'network'" in command("register", to, "--name", "x").error
