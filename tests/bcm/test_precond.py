import pytest
import torch

from bcm.precond import BCM, scalings

T = torch.logspace(-3, 2, 40, dtype=torch.float64)


def test_u_equal_t_gives_the_identity():
    _, c_skip, c_out = scalings(T, T)
    assert (c_skip - 1).abs().max() < 1e-12
    assert c_out.abs().max() < 1e-12


def test_u_zero_gives_edm():
    c_in, c_skip, c_out = scalings(T, torch.zeros_like(T), sigma_data=0.5)
    assert (c_skip - 0.25 / (T**2 + 0.25)).abs().max() < 1e-12
    assert (c_out - T * 0.5 / (T**2 + 0.25).sqrt()).abs().max() < 1e-12
    assert (c_in - 1 / (T**2 + 0.25).sqrt()).abs().max() < 1e-12


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_variance_is_carried_from_t_to_u(sigma_data: float):
    t, u = (grid.flatten() for grid in torch.meshgrid(T, T, indexing="ij"))
    _, c_skip, c_out = scalings(t, u, sigma_data)
    carried = c_skip**2 * (t**2 + sigma_data**2) + c_out**2
    assert ((carried - (u**2 + sigma_data**2)) / (u**2 + sigma_data**2)).abs().max() < 1e-12


def test_module_applies_the_formula_to_its_network():
    class Net(torch.nn.Module):
        def forward(self, x, t, u, label):
            return 3 * x + t.reshape(-1, 1, 1, 1) - u.reshape(-1, 1, 1, 1)

    x, t, u = torch.randn(5, 1, 4, 4, dtype=torch.float64), T[10:15], T[20:25]
    c_in, c_skip, c_out = (c.reshape(-1, 1, 1, 1) for c in scalings(t, u))
    expected = c_skip * x + c_out * (3 * c_in * x + (t - u).reshape(-1, 1, 1, 1))
    assert torch.allclose(BCM(Net())(x, t, u), expected, rtol=1e-12)
    assert torch.equal(BCM(Net())(x, t, t), x)
