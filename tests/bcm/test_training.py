import copy
import json
import os
import subprocess
import sys
from contextlib import AbstractContextManager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from small import CONFIG, NETWORK, SCHEDULE, batches, start, trained, weights
from torch.nn.parallel import DistributedDataParallel

from bcm.checkpoint import load_checkpoint, save_checkpoint
from bcm.ema import follow
from bcm.networks import NCSNppConfig, build_network
from bcm.objectives import OBJECTIVES
from bcm.precond import BCM
from bcm.rng import shared_dropout
from bcm.schedule import ScheduleConfig
from bcm.training import (
    MAX_SKIPPED_AT_START,
    MAX_SKIPPED_IN_A_ROW,
    TrainConfig,
    TrainState,
    fit,
    train_step,
)
from bcm.types import BCMError


def test_training_lowers_the_loss():
    config = TrainConfig(iterations=120, batch_size=8, learning_rate=1e-2, ema_rates=(0.9,))
    torch.manual_seed(0)
    state = TrainState(BCM(build_network(NETWORK)), config)
    losses = [float(sum(step.losses.values())) for step in fit(state, batches(), config, ScheduleConfig(s0=2, s1=2))]
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
    state.skipped, state.k = 0, 8
    for _ in range(MAX_SKIPPED_IN_A_ROW - 2):
        train_step(state, next(batches()), CONFIG, SCHEDULE)
    with pytest.raises(BCMError, match="diverged"):
        train_step(state, next(batches()), CONFIG, SCHEDULE)


@pytest.mark.parametrize("value", [float("nan"), 1e25])
def test_a_loss_that_is_not_finite_from_the_first_step_is_an_error(value: float):
    state = start()
    # The square of 1e25 is infinite in float32, and its gradients are zero: finite, yet worthless.
    state.model.F_theta.register_forward_hook(lambda *call: call[2] * 0 + value)
    for k in range(MAX_SKIPPED_AT_START - 1):
        step = train_step(state, next(batches(k)), CONFIG, SCHEDULE)
        assert not all(loss.isfinite() for loss in step.losses.values())
    with pytest.raises(BCMError, match="cannot start: the losses or gradients of its first 3 steps were not finite"):
        train_step(state, next(batches()), CONFIG, SCHEDULE)


def test_micro_batches_give_the_gradients_of_the_whole_batch():
    network, one = replace(NETWORK, dropout=0.0), replace(CONFIG, learning_rate=1e-2)
    expected, whole = trained(one, network)
    for accumulate in (2, 8):
        found, parts = trained(replace(one, accumulate=accumulate), network)
        for p, q in zip(weights(found), weights(expected), strict=True):
            assert torch.allclose(p, q, rtol=1e-3, atol=1e-6)
        assert all(torch.allclose(parts.losses[name], whole.losses[name], rtol=1e-4) for name in whole.losses)
    uneven = replace(CONFIG, batch_size=9, accumulate=3)
    with pytest.raises(BCMError, match="8 images of a step do not divide into train"):
        train_step(start(config=uneven), next(batches()), uneven, SCHEDULE)


def test_every_micro_batch_of_every_worker_and_step_has_masks_of_its_own(monkeypatch: pytest.MonkeyPatch):
    seeds: list[int] = []

    def noted(model: torch.nn.Module, seed: int, *, rows: int) -> AbstractContextManager[None]:
        seeds.append(seed)
        return shared_dropout(model, seed, rows=rows)

    monkeypatch.setattr("bcm.rng.shared_dropout", noted)
    config = replace(CONFIG, iterations=3, accumulate=2)
    for rank in range(3):
        assert len(list(fit(start(config=config), batches(), config, SCHEDULE, rank))) == 3
    assert len(set(seeds)) == len(seeds) == 3 * 3 * 2


def test_activation_checkpointing_changes_nothing():
    plain, _ = trained(CONFIG)
    again, _ = trained(replace(CONFIG, checkpoint_activations=True))
    assert all(torch.equal(p, q) for p, q in zip(weights(plain), weights(again), strict=True))


@pytest.mark.slow
def test_compiled_code_changes_nothing_but_rounding(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Through the compiler's front end and its autograd, where masks and gradients could be lost; not the C++.

    Alone, and with activations computed again in data-parallel training.
    """
    inner = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda *args, **options: inner(*args, **options, backend="aot_eager")
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    plain, _ = trained(CONFIG, replace(NETWORK, dropout=0.5))
    compiled, _ = trained(replace(CONFIG, compile=True), replace(NETWORK, dropout=0.5))
    for p, q in zip(weights(plain), weights(compiled), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)
    counted = torch._dynamo.utils.counters
    # The student, the target, the outer pass: each once, whole, and never again for new masks or weights.
    assert counted["stats"]["unique_graphs"] == 3 and not counted["graph_break"]

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    try:
        config = replace(CONFIG, compile=True, checkpoint_activations=True)
        state = start(replace(NETWORK, dropout=0.5), config)
        state.loss = DistributedDataParallel(state.loss, forward_sync_buffers=False, gradient_as_bucket_view=True)
        assert len(list(islice(fit(state, batches(), config, SCHEDULE), 3))) == 3
    finally:
        torch.distributed.destroy_process_group()
    for p, q in zip(weights(plain), weights(state), strict=True):
        assert torch.allclose(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.slow
def test_two_workers_equal_one_with_the_double_batch(tmp_path: Path):
    script, environment = Path(__file__).with_name("two_workers.py"), os.environ | {"OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    workers = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")], stdout=subprocess.PIPE, env=environment
        )
        for rank in range(2)
    ]
    first, second = (json.loads(worker.communicate(timeout=300)[0]) for worker in workers)
    # A loss that is not finite on one worker makes both skip the step.
    assert first.pop("skipped") == second.pop("skipped") == 1
    assert first.pop("float32") < 1e-3
    assert all(error < 1e-9 for error in first.values()), first


def test_clipping_bounds_the_gradient_that_is_applied():
    config = replace(CONFIG, clip_norm=1e-3)
    seen: list[float] = []
    state = start(config=config)
    state.optimizer.register_step_pre_hook(
        lambda *_: seen.append(
            float(torch.nn.utils.get_total_norm([p.grad for p in state.model.parameters() if p.grad is not None]))
        )
    )
    step = train_step(state, next(batches()), config, SCHEDULE)
    assert float(step.grad_norm) > 1e-3 and seen == [pytest.approx(1e-3, rel=1e-3)]


def test_batches_that_end_too_early_are_an_error():
    first = list(islice(batches(), 2))
    with pytest.raises(BCMError, match="ended after 2 of 12 steps"):
        list(fit(start(), first, CONFIG, SCHEDULE))


def test_one_tensor_at_a_time_is_the_same_optimizer():
    several, _ = trained(CONFIG)
    single, _ = trained(replace(CONFIG, foreach=False))
    assert all(
        torch.allclose(p, q, rtol=1e-5, atol=1e-8) for p, q in zip(weights(several), weights(single), strict=True)
    )


def test_bf16_stays_near_fp32_and_keeps_fp32_weights():
    exact, step = trained(CONFIG)
    rough, rough_step = trained(replace(CONFIG, precision="bf16"))
    assert {p.dtype for p in weights(rough)} == {torch.float32}
    assert any(not torch.equal(p, q) for p, q in zip(weights(exact), weights(rough), strict=True))
    assert all(torch.allclose(rough_step.losses[name], step.losses[name], rtol=0.1) for name in step.losses)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(
    "switches",
    [
        {},
        {"precision": "bf16"},
        {"precision": "bf16", "channels_last": True},
        {"precision": "bf16", "channels_last": True, "checkpoint_activations": True, "accumulate": 2},
        {"precision": "bf16", "channels_last": True, "compile": True},
    ],
    ids=lambda switches: ", ".join(switches) or "none",
)
def test_every_switch_works_on_a_gpu(switches: dict[str, Any], tmp_path: Path):
    config, exact = replace(CONFIG, **switches), trained(CONFIG)[1]

    def on_gpu() -> TrainState:
        torch.manual_seed(0)
        return TrainState(BCM(build_network(NETWORK)).cuda(), config)

    state, other = on_gpu(), on_gpu()
    *_, last = islice(fit(state, batches(), config, SCHEDULE), 3)
    # The masks depend on the kind of device, so the losses agree only as far as they agree for other masks.
    assert all(float(loss) == pytest.approx(float(exact.losses[name]), rel=0.3) for name, loss in last.losses.items())
    save_checkpoint(tmp_path, state, NETWORK)
    load_checkpoint(tmp_path, other, NETWORK)
    for p, q in zip(weights(state), weights(other), strict=True):
        assert torch.equal(p, q) and p.stride() == q.stride()


def test_channels_last_on_a_cpu_is_an_error():
    with pytest.raises(BCMError, match="channels-last needs a GPU"):
        start(config=replace(CONFIG, channels_last=True))


@pytest.mark.parametrize(("objective", "times"), [(name, entry.times) for name, entry in OBJECTIVES.items()])
def test_every_objective_trains_a_network_of_its_times(objective: str, times: int):
    config, network = replace(CONFIG, objective=objective), replace(NETWORK, times=times)
    with pytest.raises(BCMError, match=f"'{objective}' trains a network of {times} time"):
        start(replace(NETWORK, times=3 - times), config)
    state, step = trained(config, network)
    assert set(step.losses) == {"edm": {"edm"}, "ct": {"ct"}, "st-only": {"st"}}.get(objective, {"ct", "st"})
    assert state.skipped == 0 and all(loss > 0 for loss in step.losses.values())
    assert bool(step.N) == (objective != "edm")


def test_ema_follows_its_formula():
    model = torch.nn.Linear(3, 2)
    average = copy.deepcopy(model)
    old = model.weight.detach().clone()
    model.weight.data += 1
    follow(average, model, 0.75)
    assert torch.allclose(average.weight, 0.75 * old + 0.25 * model.weight)
    with pytest.raises(BCMError, match="EMA rate"):
        follow(average, model, 1.0)


@pytest.mark.parametrize(
    "wrong",
    [
        {"iterations": 0},
        {"batch_size": 0},
        {"learning_rate": 0.0},
        {"learning_rate": float("inf")},
        {"ema_rates": (1.0,)},
        {"ema_rates": ()},
        {"ema_rates": (0.9, 0.9)},
        {"objective": "bcm"},
        {"precision": "fp16"},
        {"accumulate": 0},
        {"batch_size": 9, "accumulate": 2},
        {"clip_norm": -1.0},
        {"seed": -1},
    ],
)
def test_wrong_numbers_are_refused(wrong: dict):
    with pytest.raises(BCMError, match="train"):
        TrainConfig(**wrong)
