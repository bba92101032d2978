from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from bcm.checkpoint import load_checkpoint, load_model, save_checkpoint
from bcm.ema import EMA
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.schedule import ScheduleConfig
from bcm.training import MAX_SKIPPED_IN_A_ROW, TrainConfig, TrainState, fit, train_step
from bcm.types import BCMError

NETWORK = NCSNppConfig(
    image_channels=1, resolution=8, width=8, channel_mult=(1, 1), blocks=1, attention=(), dropout=0.1
)
CONFIG = TrainConfig(iterations=12, batch_size=8, learning_rate=1e-3, ema_rate=0.9)
SCHEDULE = ScheduleConfig(s0=2, s1=8)
LEFT = torch.cat([torch.full((1, 8, 4), 255), torch.zeros(1, 8, 4)], dim=2).to(torch.uint8)
IMAGES = torch.stack([LEFT if i % 2 else LEFT.flip(2) for i in range(40)])


@dataclass
class Batch:
    positions: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor


def batches(k: int = 0) -> Iterator[Batch]:
    while True:
        positions = torch.arange(k * 8, k * 8 + 8)
        yield Batch(positions, IMAGES[positions % 40], positions % 10)
        k += 1


def start(network: NCSNppConfig = NETWORK) -> TrainState:
    torch.manual_seed(0)
    return TrainState(BCM(build_network(network)), CONFIG, conditional=network.classes > 0)


def weights(state: TrainState) -> list[torch.Tensor]:
    entries = [state.optimizer.state[p] for p in state.model.parameters() if p in state.optimizer.state]
    moments = [entry[name] for entry in entries for name in sorted(entry)]
    return [*state.model.parameters(), *state.ema.model.parameters(), *moments]


def test_resumed_training_equals_unbroken_training_bit_for_bit(tmp_path: Path):
    unbroken = start()
    steps = list(fit(unbroken, batches(), CONFIG, SCHEDULE))
    assert [step.k for step in steps] == list(range(12)) and unbroken.k == 12
    assert {step.N for step in steps} == {3, 5, 9}

    first = start()
    for step in fit(first, batches(), CONFIG, SCHEDULE):
        if step.k == 4:
            break
    save_checkpoint(tmp_path, first, NETWORK, {"note": "x"})
    second = start()
    torch.manual_seed(99)
    info = load_checkpoint(tmp_path, second, NETWORK)
    assert (info.k, info.extra) == (5, {"note": "x"})
    list(fit(second, batches(second.k), CONFIG, SCHEDULE))
    for a, b in zip(weights(unbroken), weights(second), strict=True):
        assert torch.equal(a, b)


def test_training_lowers_the_loss():
    config = TrainConfig(iterations=120, batch_size=8, learning_rate=1e-2, ema_rate=0.9)
    torch.manual_seed(0)
    state = TrainState(BCM(build_network(NETWORK)), config)
    losses = [float(step.ct + step.st) for step in fit(state, batches(), config, ScheduleConfig(s0=2, s1=2))]
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])


def test_state_does_not_depend_on_the_global_generator():
    a, b = start(), start()
    torch.manual_seed(1)
    train_step(a, next(batches()), CONFIG, SCHEDULE)
    torch.manual_seed(2)
    train_step(b, next(batches()), CONFIG, SCHEDULE)
    assert all(torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))


def test_labels_reach_a_conditional_network():
    network = NCSNppConfig(**{**NETWORK.__dict__, "classes": 10})
    a, b = start(network), start(network)
    train_step(a, next(batches()), CONFIG, SCHEDULE)
    other = next(batches())
    other.labels = (other.labels + 1) % 10
    train_step(b, other, CONFIG, SCHEDULE)
    assert any(not torch.equal(p, q) for p, q in zip(weights(a), weights(b), strict=True))


def test_non_finite_gradients_are_counted_and_never_applied():
    state = start()
    before = [p.clone() for p in weights(state)]
    next(iter(state.model.parameters())).register_hook(lambda grad: grad * float("nan"))
    train_step(state, next(batches()), CONFIG, SCHEDULE)
    assert (state.k, state.skipped) == (1, 1)
    assert all(torch.equal(p, q) for p, q in zip(before, weights(state), strict=True))
    with pytest.raises(BCMError, match="diverged"):
        for _ in range(MAX_SKIPPED_IN_A_ROW):
            train_step(state, next(batches()), CONFIG, SCHEDULE)


def test_ema_follows_its_formula():
    model = torch.nn.Linear(3, 2)
    ema = EMA(model, 0.75)
    old = model.weight.detach().clone()
    model.weight.data += 1
    ema.update(model)
    averaged = ema.model.get_parameter("weight")
    assert torch.allclose(averaged, 0.75 * old + 0.25 * model.weight)
    with pytest.raises(BCMError, match="EMA rate"):
        EMA(model, 1.0)


def test_model_for_inference_has_the_averaged_weights(tmp_path: Path):
    state = start()
    train_step(state, next(batches()), CONFIG, SCHEDULE)
    save_checkpoint(tmp_path, state, NETWORK)
    model, info = load_model(tmp_path)
    assert info.k == 1 and not model.training
    for p, q in zip(model.parameters(), state.ema.model.parameters(), strict=True):
        assert torch.equal(p, q) and not p.requires_grad


@pytest.mark.parametrize("name", ["model", "ema", "optimizer"])
def test_damaged_checkpoints_are_refused(tmp_path: Path, name: str):
    save_checkpoint(tmp_path, start(), NETWORK)
    path = tmp_path / f"{name}.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BCMError, match=f"{name}.safetensors is missing or does not match"):
        load_checkpoint(tmp_path, start(), NETWORK)


def test_unfinished_and_foreign_checkpoints_are_refused(tmp_path: Path):
    save_checkpoint(tmp_path, start(), NETWORK)
    other = NCSNppConfig(**{**NETWORK.__dict__, "width": 12})
    with pytest.raises(BCMError, match="width is 8, not 12"):
        load_checkpoint(tmp_path, start(other), other)
    (tmp_path / "checkpoint.json").unlink()
    with pytest.raises(BCMError, match="no finished checkpoint"):
        load_model(tmp_path)
    (tmp_path / "checkpoint.json").write_text('{"format": "other"}')
    with pytest.raises(BCMError, match="not of format"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"ema_rate": 1.0},
        {"seed": -1},
    ],
)
def test_wrong_numbers_are_refused(wrong: dict):
    with pytest.raises(BCMError, match="train"):
        TrainConfig(**wrong)
