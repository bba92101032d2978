import pytest
import torch
from oracle import GaussianFlow

from bcm.distance import pseudo_huber
from bcm.losses import BCTLoss, bct_loss, frozen
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.rng import shared_dropout
from bcm.schedule import T_MIN, ScheduleConfig, TrainingTimes, draw_times

G = torch.Generator().manual_seed(0)


def tiny(dropout: float = 0.0) -> BCM:
    torch.manual_seed(0)
    config = NCSNppConfig(
        image_channels=1, resolution=8, width=8, channel_mult=(1, 1), blocks=1, attention=(), dropout=dropout
    )
    model = BCM(build_network(config)).double()
    for parameter in model.parameters():  # the last layer starts at zero; give every weight something to do
        parameter.data += 0.05 * torch.randn(parameter.shape, dtype=torch.float64, generator=G)
    return model


def batch(size: int = 6) -> tuple[torch.Tensor, torch.Tensor, TrainingTimes]:
    g = torch.Generator().manual_seed(1)
    x = torch.rand(size, 1, 8, 8, dtype=torch.float64, generator=g) * 2 - 1
    z = torch.randn(x.shape, dtype=torch.float64, generator=g)
    return x, z, draw_times(torch.rand(size, 2, dtype=torch.float64, generator=g), 41, ScheduleConfig())


def reference(f: BCM, x: torch.Tensor, z: torch.Tensor, times: TrainingTimes, seed: int) -> torch.Tensor:
    """Algorithm 1 written out: four calls one after the other, one image's times at a time in the weights."""

    def call(x_t: torch.Tensor, t: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
        with shared_dropout(f, seed, rows=len(x)):
            return f(x_t, t, u)

    def along(t: torch.Tensor) -> torch.Tensor:
        return x + t.reshape(-1, 1, 1, 1) * z

    zero = torch.full_like(times.t_n, T_MIN)
    with torch.no_grad():
        target = call(along(times.t_n), times.t_n, zero)
    ct = pseudo_huber(call(along(times.t_next), times.t_next, zero), target)
    x_prime = call(along(times.t_n), times.t_n, times.t_prime)
    for parameter in f.parameters():
        parameter.requires_grad_(False)
    st = pseudo_huber(call(x_prime, times.t_prime, zero), target)
    for parameter in f.parameters():
        parameter.requires_grad_(True)
    per_image = [
        float(1 / (times.t_next[i] - times.t_n[i])) * ct[i] + float(1 / abs(times.t_n[i] - times.t_prime[i])) * st[i]
        for i in range(len(x))
    ]
    return torch.stack(per_image).mean()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_merged_loss_and_gradients_equal_the_plain_algorithm(dropout: float):
    f = tiny(dropout)
    x, z, times = batch()
    expected = reference(f, x, z, times, seed=5)
    expected.backward()
    gradients = [p.grad.clone() for p in f.parameters() if p.grad is not None]
    f.zero_grad()
    ct, st = BCTLoss(f)(x, z, times, None, 5)
    (ct + st).backward()
    assert torch.allclose(ct + st, expected, rtol=1e-9)
    for found, wanted in zip((p.grad for p in f.parameters() if p.grad is not None), gradients, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-6, atol=1e-9 * float(wanted.abs().max()) + 1e-12)


def test_outer_pass_has_frozen_parameters_but_carries_gradient_to_its_input():
    f = tiny()
    x, _, times = batch()
    x_t = x.clone().requires_grad_()
    frozen(f)(x_t, times.t_n, times.t_prime).square().sum().backward()
    assert x_t.grad is not None and x_t.grad.abs().sum() > 0
    assert all(p.grad is None for p in f.parameters())


def test_frozen_follows_the_weights_and_changes_nothing():
    f = tiny()
    x, _, times = batch()
    expected = f(x, times.t_n, times.t_prime)
    assert torch.allclose(frozen(f)(x, times.t_n, times.t_prime), expected, rtol=1e-12, atol=1e-13)
    assert all(p.requires_grad for p in f.parameters())


def test_soft_trajectory_term_vanishes_on_the_exact_flow():
    x, z, times = batch()
    f = GaussianFlow()
    losses = bct_loss(f, f, x, z, times)
    assert losses.st.abs().max() < 1e-6
    assert (losses.ct > 0).all()
    assert torch.equal(losses.bct, losses.ct + losses.st)


def test_student_is_called_once_and_teacher_twice():
    x, z, times = batch()
    student, teacher = GaussianFlow(), GaussianFlow()
    bct_loss(student, teacher, x, z, times)
    assert len(student.calls) == 1 and len(teacher.calls) == 2


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    c = 0.00054 * 192**0.5
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    near, far = x + 1e-6, x + 10.0
    assert pseudo_huber(x, x).item() == 0
    assert pseudo_huber(x, near).item() == pytest.approx(192 * 1e-12 / (2 * c), rel=1e-3)
    assert pseudo_huber(x, far).item() == pytest.approx((192 * 100 + c**2) ** 0.5 - c, rel=1e-12)
