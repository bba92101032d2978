import pytest
import torch
from oracle import GaussianFlow
from torch import Tensor

from bcm import losses
from bcm.distance import pseudo_huber
from bcm.schedule import ScheduleConfig, TrainingTimes, draw_noise_levels, draw_times

G = torch.Generator().manual_seed(1)
X = torch.rand(6, 1, 8, 8, dtype=torch.float64, generator=G) * 2 - 1
Z = torch.randn(X.shape, dtype=torch.float64, generator=G)
UNIFORMS = torch.rand(6, 2, dtype=torch.float64, generator=G)
ON_GRID = {
    "ct": losses.ct_loss,
    "bct": losses.bct_loss,
    "bct-eq8": losses.bct_eq8_loss,
    "st-only": losses.st_loss,
    "bct-official": losses.bct_official_loss,
}


def times(start_next: bool = False) -> TrainingTimes:
    return draw_times(UNIFORMS, 41, ScheduleConfig(), start_next=start_next)


@pytest.mark.parametrize(
    ("name", "student", "teacher"),
    [("ct", 1, 1), ("bct", 1, 2), ("bct-eq8", 1, 2), ("st-only", 1, 2), ("bct-official", 1, 2)],
)
def test_student_and_targets_are_one_batch_each(name: str, student: int, teacher: int):
    f, f_bar = GaussianFlow(), GaussianFlow()
    ON_GRID[name](f, f_bar, X, Z, times())
    assert (len(f.calls), len(f_bar.calls)) == (student, teacher)


@pytest.mark.parametrize("name", ["bct", "st-only"])
def test_soft_trajectory_term_vanishes_on_the_exact_flow(name: str):
    f = GaussianFlow()
    terms = ON_GRID[name](f, f, X, Z, times())
    assert terms["st"].abs().max() < 1e-6
    assert all((loss > 0).all() for term, loss in terms.items() if term != "st")


def test_the_ablation_of_eq8_does_not_vanish_on_the_exact_flow():
    # x + t_n z and x + t_n' z lie on different trajectories: the flaw that Eq. 9 mends.
    f = GaussianFlow()
    assert (losses.bct_eq8_loss(f, f, X, Z, times())["st"] > 1e-4).any()


def test_the_ablations_share_the_terms_of_the_paper():
    f = GaussianFlow()
    paper = losses.bct_loss(f, f, X, Z, times())
    assert torch.equal(losses.ct_loss(f, f, X, Z, times())["ct"], paper["ct"])
    assert torch.equal(losses.bct_eq8_loss(f, f, X, Z, times())["ct"], paper["ct"])
    assert torch.equal(losses.st_loss(f, f, X, Z, times())["st"], paper["st"])


def test_diffusion_loss_is_weighted_squared_error():
    def mean_image(x_t: Tensor, t: Tensor, u: Tensor, label: Tensor | None = None) -> Tensor:
        assert not u.any()
        return torch.zeros_like(x_t)

    levels = draw_noise_levels(UNIFORMS, 0.5)
    found = losses.edm_loss(mean_image, mean_image, X, Z, levels)["edm"]
    expected = (levels.sigma**2 + 0.25) / (0.5 * levels.sigma) ** 2 * X.flatten(1).norm(dim=1) ** 2
    assert torch.allclose(found, expected, rtol=1e-12)


def test_labels_reach_every_image_of_a_merged_batch():
    label = torch.arange(6)
    seen: list[Tensor] = []

    def f(x_t: Tensor, t: Tensor, u: Tensor, label: Tensor | None = None) -> Tensor:
        assert label is not None and len(label) == len(x_t)
        seen.append(label)
        return x_t

    losses.bct_loss(f, f, X, Z, times(), label)
    assert [list(labels) for labels in seen] == [list(label) * 2, list(label), list(label)]


def test_pseudo_huber_is_quadratic_near_and_linear_far():
    c = 0.00054 * 192**0.5
    x = torch.zeros(1, 3, 8, 8, dtype=torch.float64)
    near, far = x + 1e-6, x + 10.0
    assert pseudo_huber(x, x).item() == 0
    assert pseudo_huber(x, near).item() == pytest.approx(192 * 1e-12 / (2 * c), rel=1e-3)
    assert pseudo_huber(x, far).item() == pytest.approx((192 * 100 + c**2) ** 0.5 - c, rel=1e-12)
