"""Each objective on a real network against the same written out plainly: one call after the other."""

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from bcm.networks import NCSNppConfig, build_network
from bcm.objectives import OBJECTIVES, TrainingLoss, frozen
from bcm.precond import BCM
from bcm.rng import shared_dropout
from bcm.schedule import ScheduleConfig, TrainingTimes
from bcm.types import BCMError

SEED = 5
NETWORK = NCSNppConfig(image_channels=1, resolution=8, width=8, channel_mult=(1, 1), blocks=1, attention=())


def tiny(times: int = 2, dropout: float = 0.3, dtype: torch.dtype = torch.float64) -> BCM:
    torch.manual_seed(0)
    config = NCSNppConfig(**{**NETWORK.__dict__, "times": times, "dropout": dropout})
    model = BCM(build_network(config)).to(dtype)
    g = torch.Generator().manual_seed(2)
    for parameter in model.parameters():  # the last layer starts at zero; give every weight something to do
        parameter.data += 0.05 * torch.randn(parameter.shape, dtype=dtype, generator=g)
    return model


def batch(name: str, size: int = 6, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Any]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(size, 1, 8, 8, dtype=dtype, generator=g) * 2 - 1
    z = torch.randn(x.shape, dtype=dtype, generator=g)
    uniforms = torch.rand(size, 2, dtype=torch.float64, generator=g)
    return x, z, OBJECTIVES[name].draw(uniforms, 41, ScheduleConfig())


class Plain:
    """The four calls of a step, one after the other, each under masks of the same seed."""

    def __init__(self, f: BCM, x: Tensor, z: Tensor, times: TrainingTimes) -> None:
        self.f, self.x, self.z, self.times = f, x, z, times
        self.zero = torch.full_like(times.t_n, 0.002)

    def at(self, t: Tensor) -> Tensor:
        return self.x + t.to(self.x.dtype).reshape(-1, 1, 1, 1) * self.z

    def call(self, x_t: Tensor, t: Tensor, u: Tensor) -> Tensor:
        with shared_dropout(self.f, SEED, rows=len(self.x)):
            return self.f(x_t, t, u)

    @contextmanager
    def no_weight_gradients(self):
        for parameter in self.f.parameters():
            parameter.requires_grad_(False)
        yield
        for parameter in self.f.parameters():
            parameter.requires_grad_(True)

    def clean(self, t: Tensor) -> Tensor:
        with torch.no_grad(), self.no_weight_gradients():
            return self.call(self.at(t), t, self.zero)

    def ct(self, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        t_n, t_next = self.times.t_n, self.times.t_next
        return distance(self.call(self.at(t_next), t_next, self.zero), self.clean(t_n)) / (t_next - t_n)

    def st(self, start: Tensor, target: Tensor, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        t_prime = self.times.t_prime
        x_prime = self.call(self.at(start), start, t_prime)
        with self.no_weight_gradients():
            x_0 = self.call(x_prime, t_prime, self.zero)
        return distance(x_0, target) / (start - t_prime).abs()


def paper_distance(a: Tensor, b: Tensor) -> Tensor:
    c = 0.00054 * 64**0.5
    return ((a - b).flatten(1).square().sum(1) + c**2).sqrt() - c


def official_distance(a: Tensor, b: Tensor) -> Tensor:
    return (((a - b).flatten(1).square().sum(1) + 0.06**2).sqrt() - 0.06) / 8


def reference(name: str, f: BCM, x: Tensor, z: Tensor, times: Any) -> dict[str, Tensor]:
    """The mean of each term of the objective, by the formulas of the paper and the facts of the official code."""
    if name == "edm":
        sigma, weight = times.sigma, times.weight
        with shared_dropout(f, SEED, rows=len(x)):
            denoised = f(x + sigma.to(x.dtype).reshape(-1, 1, 1, 1) * z, sigma, 0 * sigma)
        return {"edm": (weight * (denoised - x).square().sum((1, 2, 3))).mean()}
    plain = Plain(f, x, z, times)
    distance = official_distance if name == "bct-official" else paper_distance
    terms = {}
    if name != "st-only":
        terms["ct"] = plain.ct(distance).mean()
    if name != "ct":
        start = times.t_next if name == "bct-official" else times.t_n
        target = plain.clean(times.t_prime if name == "bct-eq8" else times.t_n)
        terms["st"] = plain.st(start, target, distance).mean()
    return terms


def gradients(f: BCM) -> list[Tensor]:
    found = [p.grad.clone() for p in f.parameters() if p.grad is not None]
    f.zero_grad()
    return found


def close(found: list[Tensor], wanted: list[Tensor], relative: float) -> bool:
    """Whether the whole gradients agree in norm, relative to the wanted one's."""
    assert len(found) == len(wanted)
    difference = torch.stack([(a - b).norm() for a, b in zip(found, wanted, strict=True)]).norm()
    return bool(difference <= relative * torch.stack([b.norm() for b in wanted]).norm())


@pytest.mark.parametrize("name", OBJECTIVES)
def test_loss_and_gradients_equal_the_plain_algorithm(name: str):
    f = tiny(OBJECTIVES[name].times)
    x, z, times = batch(name)
    expected = reference(name, f, x, z, times)
    torch.stack(list(expected.values())).sum().backward()
    wanted = gradients(f)
    with shared_dropout(f, SEED, rows=len(x)):
        found = TrainingLoss(f, OBJECTIVES[name])(x, z, times, None)
    torch.stack(list(found.values())).sum().backward()
    assert list(found) == list(expected)
    assert all(torch.allclose(found[term], expected[term], rtol=1e-10) for term in found)
    assert close(gradients(f), wanted, 1e-10)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_single_precision_differs_from_the_plain_algorithm_in_the_order_of_sums_alone(name: str):
    f = tiny(OBJECTIVES[name].times, dtype=torch.float32)
    # What is left is oneDNN's sum over all rows in a weight's gradient: about .4e-6 for 4 rows, 1.3e-6 for 32.
    x, z, times = batch(name, size=4, dtype=torch.float32)
    expected = torch.stack(list(reference(name, f, x, z, times).values())).sum()
    expected.backward()
    wanted = gradients(f)
    with shared_dropout(f, SEED, rows=len(x)):
        found = torch.stack(list(TrainingLoss(f, OBJECTIVES[name])(x, z, times, None).values())).sum()
    found.backward()
    assert torch.allclose(found, expected, rtol=1e-6, atol=0)
    assert close(gradients(f), wanted, 1e-6)


def test_masks_of_another_seed_are_another_loss():
    f = tiny()
    x, z, times = batch("bct")
    values: list[float] = []
    for seed in (1, 2, 1):
        with shared_dropout(f, seed, rows=len(x)):
            values.append(float(TrainingLoss(f, OBJECTIVES["bct"])(x, z, times, None)["ct"].detach()))
    assert values[0] == values[2] != values[1]


def test_outer_pass_has_frozen_parameters_but_carries_gradient_to_its_input():
    f = tiny()
    x, _, times = batch("bct")
    x_t = x.clone().requires_grad_()
    frozen(f)(x_t, times.t_n, times.t_prime).square().sum().backward()
    assert x_t.grad is not None and x_t.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in f.parameters())


def test_frozen_follows_the_weights_in_place_and_counts_no_weight_twice():
    f = tiny(dropout=0)
    x, _, times = batch("bct")
    loss = TrainingLoss(f, OBJECTIVES["bct"])
    f_bar = frozen(f)
    with torch.no_grad():
        before = f_bar(x, times.t_n, times.t_prime)
        for parameter in f.parameters():
            parameter.mul_(1.1)
        after = f_bar(x, times.t_n, times.t_prime)
        assert torch.allclose(after, f(x, times.t_n, times.t_prime), rtol=1e-12) and not torch.allclose(before, after)
    assert [name.removeprefix("f.") for name in loss.state_dict()] == list(f.state_dict())


def test_a_model_that_was_moved_afterwards_is_an_error():
    f = tiny()
    x, z, times = batch("bct", dtype=torch.float32)
    loss = TrainingLoss(f, OBJECTIVES["bct"])
    f.float()
    with pytest.raises(BCMError, match="moved after"):
        loss(x, z, times, None)


def test_autocast_reaches_the_network_alone():
    f = tiny(dtype=torch.float32)
    x, z, times = batch("bct", dtype=torch.float32)
    seen: set[torch.dtype] = set()
    f.F_theta.register_forward_hook(lambda *call: seen.add(call[2].dtype))
    losses: list[Tensor] = []
    for bf16 in (False, True):
        with shared_dropout(f, SEED, rows=len(x)):
            losses.append(TrainingLoss(f, OBJECTIVES["bct"], bf16=bf16)(x, z, times, None)["ct"].detach())
    assert seen == {torch.float32, torch.bfloat16}
    assert losses[0].dtype == losses[1].dtype
    assert losses[0] != losses[1] and torch.allclose(losses[0], losses[1], rtol=0.03)


def test_targets_need_no_weight_gradients():
    """The teacher's passes leave the gradients of all weights to the student's."""
    f = tiny(dropout=0)
    x, z, times = batch("bct")
    f.requires_grad_(False)
    terms = TrainingLoss(f, OBJECTIVES["bct"])(x, z, times, None)
    assert not any(term.requires_grad for term in terms.values())
