"""Checkpoints: what is saved comes back, what is damaged is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small import CONFIG, NETWORK, SCHEDULE, batches, start, trained, weights

from bcm.checkpoint import (
    INDEX,
    attachment,
    load_checkpoint,
    load_model,
    local_index,
    save_checkpoint,
    verify_files,
)
from bcm.ema import follow
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.training import TrainState, fit, train_step
from bcm.types import BCMError


def test_resumed_training_equals_unbroken_training_bit_for_bit(tmp_path: Path):
    unbroken = start()
    steps = list(fit(unbroken, batches(), CONFIG, SCHEDULE))
    assert [step.k for step in steps] == list(range(12)) and unbroken.k == 12
    assert {step.N for step in steps} == {3, 5, 9}

    first = start()
    for step in fit(first, batches(), CONFIG, SCHEDULE):
        if step.k == 4:
            break
    save_checkpoint(tmp_path, first, NETWORK, {"notes.json": b"x"})
    second = start()
    torch.manual_seed(99)
    assert load_checkpoint(tmp_path, second, NETWORK).k == 5
    assert attachment(tmp_path, "notes.json") == b"x"
    list(fit(second, batches(second.k), CONFIG, SCHEDULE))
    for a, b in zip(weights(unbroken), weights(second), strict=True):
        assert torch.equal(a, b)


def test_channels_last_weights_moments_and_averages_are_saved_and_come_back_in_their_layout(tmp_path: Path):
    def channels_last() -> TrainState:
        torch.manual_seed(0)
        model = BCM(build_network(NETWORK))
        return TrainState(model.to(memory_format=torch.channels_last), CONFIG)  # pyright: ignore

    state, other = channels_last(), channels_last()
    for parameter in state.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    state.optimizer.step()  # pyright: ignore[reportUnknownMemberType]
    follow(state.ema, state.model, 0.9)
    save_checkpoint(tmp_path, state, NETWORK)
    load_checkpoint(tmp_path, other, NETWORK)
    for p, q in zip(weights(state), weights(other), strict=True):
        assert torch.equal(p, q) and p.stride() == q.stride()
    moments = [moment for entry in other.optimizer.state.values() for moment in entry.values()]
    assert not all(moment.is_contiguous() for moment in moments)


def test_several_averages_are_kept_saved_and_continued(tmp_path: Path):
    config = replace(CONFIG, ema_rates=(0.9, 0.5))
    state, _ = trained(config)
    alone, _ = trained(replace(CONFIG, ema_rates=(0.5,)))
    for p, q in zip(state.averages[0.5].parameters(), alone.ema.parameters(), strict=True):
        assert torch.equal(p, q)
    save_checkpoint(tmp_path, state, NETWORK)
    other = start(config=config)
    assert load_checkpoint(tmp_path, other, NETWORK).ema_rates == (0.9, 0.5)
    assert all(torch.equal(p, q) for p, q in zip(weights(state), weights(other), strict=True))
    for rate, average in ((None, state.ema), *state.averages.items()):
        model, _ = load_model(tmp_path, ema_rate=rate)
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), average.parameters(), strict=True))
    with pytest.raises(BCMError, match=r"averages of rates \(0.9, 0.5\), none of 0.7"):
        load_model(tmp_path, ema_rate=0.7)
    with pytest.raises(BCMError, match=r"averages of rates \(0.9, 0.5\), not \(0.9,\)"):
        load_checkpoint(tmp_path, start(), NETWORK)


def test_skipped_steps_and_the_objective_are_kept(tmp_path: Path):
    config = replace(CONFIG, objective="bct-eq8")
    save_checkpoint(tmp_path, start(config=config), NETWORK)
    fresh = local_index(tmp_path)
    assert (fresh.k, fresh.skipped, fresh.skipped_in_a_row) == (0, 0, 0)
    state, other = start(config=config), start(config=config)
    state.k, state.skipped, state.skipped_in_a_row = 9, 5, 3
    save_checkpoint(tmp_path, state, NETWORK)
    assert load_checkpoint(tmp_path, other, NETWORK).objective == "bct-eq8"
    assert (other.k, other.skipped, other.skipped_in_a_row) == (9, 5, 3)


def test_a_folder_that_is_written_anew_is_unfinished_until_its_index_stands(tmp_path: Path):
    save_checkpoint(tmp_path, start(), NETWORK)
    with pytest.raises(FileNotFoundError):
        save_checkpoint(tmp_path, start(), NETWORK, {"absent/notes.json": b""})
    with pytest.raises(BCMError, match="no finished checkpoint"):
        load_model(tmp_path)


def test_model_for_inference_has_the_averaged_weights(tmp_path: Path):
    state = start()
    train_step(state, next(batches()), CONFIG, SCHEDULE)
    save_checkpoint(tmp_path, state, NETWORK)
    model, info = load_model(tmp_path)
    assert info.k == 1 and not model.training
    for p, q in zip(model.parameters(), state.ema.parameters(), strict=True):
        assert torch.equal(p, q) and not p.requires_grad


@pytest.mark.parametrize("name", ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "notes.json"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, name: str):
    save_checkpoint(tmp_path, start(), NETWORK, {"notes.json": b"{}"})
    verify_files(tmp_path)
    path = tmp_path / name
    path.write_bytes(path.read_bytes()[:-1])
    readers = [lambda: verify_files(tmp_path), lambda: attachment(tmp_path, name)]
    if name != "notes.json":
        readers.append(lambda: load_checkpoint(tmp_path, start(), NETWORK))
    for read in readers:
        with pytest.raises(BCMError, match=f"{name} is missing or does not match"):
            read()


def test_the_index_of_a_model_for_inference_names_one_average_alone(tmp_path: Path):
    state = start(config=replace(CONFIG, ema_rates=(0.9, 0.5)))
    save_checkpoint(tmp_path, state, NETWORK, {"notes.json": b"{}"})
    index = local_index(tmp_path)
    for rate, name in ((None, "ema.safetensors"), (0.9, "ema.safetensors"), (0.5, "ema1.safetensors")):
        alone = index.for_inference(rate)
        assert alone.files == {"ema.safetensors": index.files[name]} and alone.ema_rates == ()
    with pytest.raises(BCMError, match=r"holds no ema1\.safetensors"):
        replace(index, files={"ema.safetensors": index.files["ema.safetensors"]}).for_inference(0.5)


def test_unfinished_and_foreign_checkpoints_are_refused(tmp_path: Path):
    save_checkpoint(tmp_path, start(), NETWORK)
    other = NCSNppConfig(**{**NETWORK.__dict__, "width": 12})
    with pytest.raises(BCMError, match="width is 8, not 12"):
        load_checkpoint(tmp_path, start(other), other)
    (tmp_path / "checkpoint.json").unlink()
    with pytest.raises(BCMError, match="no finished checkpoint"):
        load_model(tmp_path)


@pytest.mark.parametrize(("key", "value"), [("format", "other"), ("version", 1)])
def test_an_index_of_another_format_is_refused(tmp_path: Path, key: str, value: object):
    save_checkpoint(tmp_path, start(), NETWORK)
    index = json.loads((tmp_path / INDEX).read_text())
    (tmp_path / INDEX).write_text(json.dumps({**index, key: value}))
    with pytest.raises(BCMError, match=f"{key}: input should be"):
        load_model(tmp_path)


def test_inference_reads_the_index_and_one_average_alone(tmp_path: Path):
    state, _ = trained(replace(CONFIG, ema_rates=(0.9, 0.5)))
    save_checkpoint(tmp_path, state, NETWORK)
    for path in tmp_path.iterdir():
        if path.name not in (INDEX, "ema1.safetensors"):
            path.unlink()
    assert load_model(tmp_path, ema_rate=0.5)[1].average(0.5) == "ema1.safetensors"
