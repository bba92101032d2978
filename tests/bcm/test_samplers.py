"""Every sampler and inverter on the exact Gaussian flow, where the answer is known."""

import pytest
import torch
from oracle import GaussianFlow

from bcm.inversion import invert, reconstruct
from bcm.samplers import ancestral, combined, multistep, one_step, sample, zigzag
from bcm.schedule import T_MAX, T_MIN
from bcm.timesteps import PAPER_CIFAR10, Ancestral, Combined, Inversion, Multistep, Zigzag
from bcm.types import BCMError

S = 0.5
X = torch.randn(4000, 1, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def noise(k: int) -> torch.Tensor:
    return torch.randn(X.shape, dtype=X.dtype, generator=torch.Generator().manual_seed(100 + k))


def scale(t: float, u: float) -> float:
    return ((u**2 + S**2) / (t**2 + S**2)) ** 0.5


def test_one_step_is_the_flow_from_T_to_0():
    assert torch.allclose(one_step(GaussianFlow(S), T_MAX * X), scale(T_MAX, T_MIN) * T_MAX * X, rtol=1e-12)


@pytest.mark.parametrize("times", [(T_MIN, T_MAX), (T_MIN, 1.2, T_MAX), (T_MIN, 0.1, 1.0, 10.0, T_MAX)])
def test_ancestral_walks_the_trajectory_whatever_the_steps(times: tuple[float, ...]):
    f = GaussianFlow(S)
    x = ancestral(f, T_MAX * X, Ancestral(times=times))
    assert torch.allclose(x, scale(T_MAX, T_MIN) * T_MAX * X, rtol=1e-10)
    assert f.calls == list(zip(times[:0:-1], times[-2::-1], strict=True))


def test_zigzag_follows_algorithm_3_call_by_call():
    f = GaussianFlow(S)
    steps = Zigzag(times=(0.3, 0.8, T_MAX), noise_scales=(0.1, 0.2))
    x = zigzag(f, T_MAX * X, steps, noise)
    assert f.calls == [(T_MAX, T_MIN), (0.2, 0.8), (0.8, T_MIN), (0.1, 0.3), (0.3, T_MIN)]
    y = scale(T_MAX, T_MIN) * T_MAX * X
    y = scale(0.8, T_MIN) * scale(0.2, 0.8) * (y + 0.2 * noise(1))
    y = scale(0.3, T_MIN) * scale(0.1, 0.3) * (y + 0.1 * noise(0))
    assert torch.allclose(x, y, rtol=1e-10)


def test_combined_is_ancestral_down_to_t1_then_zigzag():
    f = GaussianFlow(S)
    x = combined(f, T_MAX * X, Combined(times=(1.2, T_MAX), zigzag_times=(0.3,), noise_scales=(0.1,)), noise)
    assert f.calls == [(T_MAX, 1.2), (1.2, T_MIN), (0.1, 0.3), (0.3, T_MIN)]
    y = scale(1.2, T_MIN) * scale(T_MAX, 1.2) * T_MAX * X
    assert torch.allclose(x, scale(0.3, T_MIN) * scale(0.1, 0.3) * (y + 0.1 * noise(0)), rtol=1e-10)


def test_multistep_follows_the_consistency_models_algorithm_call_by_call():
    f = GaussianFlow(S)
    x = multistep(f, T_MAX * X, Multistep(times=(0.3, 0.821, T_MAX)), noise)
    assert f.calls == [(T_MAX, T_MIN), (0.821, T_MIN), (0.3, T_MIN)]
    y = scale(T_MAX, T_MIN) * T_MAX * X
    y = scale(0.821, T_MIN) * (y + (0.821**2 - T_MIN**2) ** 0.5 * noise(1))
    y = scale(0.3, T_MIN) * (y + (0.3**2 - T_MIN**2) ** 0.5 * noise(0))
    assert torch.allclose(x, y, rtol=1e-10)


def test_multistep_keeps_the_spread_of_the_data_at_any_mid_times():
    f, steps = GaussianFlow(S), Multistep(times=(0.05, 0.4, 1.526, 9.0, T_MAX))
    x = sample(f, X, steps, noise)
    assert len(f.calls) == steps.nfe == 5
    assert x.std() == pytest.approx(S, rel=0.02)


def test_multistep_with_no_mid_time_is_one_step():
    x = multistep(GaussianFlow(S), T_MAX * X, Multistep(times=(T_MAX,)), noise)
    assert torch.equal(x, one_step(GaussianFlow(S), T_MAX * X))


@pytest.mark.parametrize("name", [name for name in PAPER_CIFAR10 if name.startswith("sample")])
def test_samples_have_the_spread_of_the_data_and_cost_their_nfe(name: str):
    f, steps = GaussianFlow(S), PAPER_CIFAR10[name]
    x = sample(f, X, steps, noise)
    assert len(f.calls) == steps.nfe == int(name[-1])
    assert x.std() == pytest.approx(S, rel=0.05)


@pytest.mark.parametrize("name", [name for name in PAPER_CIFAR10 if name.startswith("invert")])
def test_inversion_reaches_noise_and_costs_its_nfe(name: str):
    f, steps = GaussianFlow(S), PAPER_CIFAR10[name]
    assert isinstance(steps, Inversion)
    x_T = invert(f, S * X, steps, noise(0))
    assert len(f.calls) == steps.nfe == int(name[-1])
    assert torch.allclose(x_T, scale(0.07, T_MAX) * (S * X + 0.07 * noise(0)), rtol=1e-10)
    assert x_T.std() == pytest.approx(T_MAX, rel=0.05)


def test_reconstruction_loses_only_the_initial_noise():
    steps = Inversion(times=(0.07, 6.0, 20.0))
    x = reconstruct(GaussianFlow(S), S * X, steps, noise(0))
    assert torch.allclose(x, scale(0.07, T_MIN) * (S * X + 0.07 * noise(0)), rtol=1e-10)
    assert (x - S * X).std() == pytest.approx(0.07, rel=0.05)


def test_sampling_with_inversion_steps_is_refused():
    with pytest.raises(BCMError, match="sampling needs"):
        sample(GaussianFlow(S), X, Inversion(times=(0.07, T_MAX)), noise)
