"""A consistency model becomes bidirectional without forgetting anything."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from bcm.finetune import bidirectional
from bcm.networks import ADMConfig, NCSNppConfig, NetworkConfig, build_network
from bcm.precond import BCM, SIGMA_DATA, scalings
from bcm.schedule import T_MAX, T_MIN
from bcm.types import BCMError, at_time

NCSNPP = NCSNppConfig(
    image_channels=1, resolution=8, width=8, channel_mult=(1, 2), blocks=1, attention=(4,), dropout=0.0, times=1
)
ADM = ADMConfig(
    resolution=8,
    width=32,
    channel_mult=(1, 1),
    blocks=1,
    attention=(4,),
    head_channels=16,
    dropout=0.0,
    times=1,
    classes=3,
)
NETWORKS = {
    "ncsnpp": NCSNPP,
    "conditional": replace(NCSNPP, classes=3),
    "skips": replace(NCSNPP, progressive="output_skip", progressive_input="input_skip"),
    "adm": ADM,
}


@pytest.fixture(params=NETWORKS)
def network(request: pytest.FixtureRequest) -> NetworkConfig:
    return NETWORKS[request.param]


def trained(network: NetworkConfig) -> BCM:
    """A model whose weights are all far from those it is built with."""
    torch.manual_seed(0)
    model = BCM(build_network(network)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(network: NetworkConfig) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """x_t, t, t_min and labels of a batch over the whole range of t."""
    torch.manual_seed(1)
    t = torch.tensor([T_MIN, 0.02, 0.5, 3.0, T_MAX], dtype=torch.float64)
    x = torch.randn(len(t), network.image_channels, network.resolution, network.resolution)
    label = torch.arange(len(t)) % network.classes if network.classes else None
    return x * (0.25 + t.float() ** 2).sqrt()[:, None, None, None], t, torch.full_like(t, T_MIN), label


@torch.no_grad()
def test_at_step_0_the_way_to_0_is_what_it_was(network: NetworkConfig):
    ict = trained(network)
    model, wider = bidirectional(ict, network)
    x, t, zero, label = inputs(network)
    before, after = ict(x, t, zero, label), model.eval()(x, t, zero, label)
    assert (before - x).abs().max() > 0.1
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)
    assert wider.times == 2 and model.F_theta.config == wider
    assert torch.equal(model.F_theta(x, t, 3 * t, label), model.F_theta(x, t, zero, label))


def test_learning_unties_the_two_times(network: NetworkConfig):
    model, _ = bidirectional(trained(network), network)
    x, t, _, label = inputs(network)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(2):  # the projection of u starts at zero, so what lies before it moves in the second step
        optimizer.zero_grad()
        model.F_theta(x, t, t / 2, label).square().mean().backward()
        optimizer.step()
    embedding = model.F_theta.embedding
    assert isinstance(embedding, torch.nn.Module)
    weights = dict(embedding.named_parameters())
    assert weights["end0.weight"].grad.abs().max() > 0  # type: ignore[union-attr]
    assert not torch.equal(weights["dense0.weight"], weights["end0.weight"])
    assert not torch.equal(model.F_theta(x, t, 3 * t, label), model.F_theta(x, t, t, label))


def test_the_model_it_came_from_keeps_its_weights(network: NetworkConfig):
    ict = trained(network)
    before = {name: tensor.clone() for name, tensor in ict.state_dict().items()}
    model, _ = bidirectional(ict, network)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in ict.state_dict().items())


def test_the_boundary_scalings_of_older_models_are_near():
    """Eq. 54: c_skip of Song et al. (2023) differs from Eq. 5 at u = t_min by t_min / (2 sigma_data) at most."""
    t = torch.logspace(-2.69, 1.9, 10_000, dtype=torch.float64)
    boundary = SIGMA_DATA**2 / ((t - T_MIN) ** 2 + SIGMA_DATA**2)
    _, c_skip, _ = scalings(t, torch.full_like(t, T_MIN))
    gap = (boundary - c_skip).abs().max()
    assert 0.4 * T_MIN / (2 * SIGMA_DATA) < gap <= T_MIN / (2 * SIGMA_DATA)


def test_a_model_of_two_times_is_refused():
    two = replace(NCSNPP, times=2)
    with pytest.raises(BCMError, match=r"reads two times already; fine-tuning starts from one that reads t alone"):
        bidirectional(BCM(build_network(two)), two)


def test_to_stay_where_it_is_changes_nothing(network: NetworkConfig):
    """The network ignores u, c_skip and c_out do not: at u = t the model is the identity."""
    model, _ = bidirectional(trained(network), network)
    x, _, _, label = inputs(network)
    torch.testing.assert_close(model(x, at_time(3.0, x), at_time(3.0, x), label), x, rtol=1e-6, atol=1e-6)
