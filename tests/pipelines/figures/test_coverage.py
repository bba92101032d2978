"""The law of the time pairs: its figures are exact, its maps show what they say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bcm.pairs import PAIR_LAWS
from bcm.schedule import ScheduleConfig, draw_times
from pipelines.figures.coverage import coverage, maps
from pipelines.figures.grid import save
from pipelines.recipes import recipe

SCHEDULE = recipe("cifar10-bcm").schedule


def test_figures_of_the_paper():
    """Computed independently for the last stage on CIFAR-10."""
    paper = coverage(SCHEDULE, "paper", 1281)
    assert paper.chance((0, 0.085)) == pytest.approx(0.244, abs=5e-4)
    assert paper.chance((1, np.inf)) == pytest.approx(0.29, abs=5e-4)
    assert paper.chance((0.05, 0.1), (60, np.inf)) == pytest.approx(1.7e-4, abs=0.05e-4)


@pytest.mark.parametrize("law", PAIR_LAWS)
def test_chances_are_those_of_training(law: str):
    N, B = 41, 200_000
    law_of_pairs = coverage(SCHEDULE, law, N)
    assert law_of_pairs.chances.shape == (N - 1, N)
    assert law_of_pairs.chance((0, np.inf)) == pytest.approx(1, abs=1e-12)
    uniforms = torch.rand(B, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    times = draw_times(uniforms, N, ScheduleConfig(pairs=law))
    for t, u in (((0, 0.085), (0, np.inf)), ((0.01, 0.5), (10, np.inf)), ((1, np.inf), (0, 0.1)), ((0.1, 2), (0.1, 2))):
        inside = (times.t_n > t[0]) & (times.t_n < t[1]) & (times.t_prime > u[0]) & (times.t_prime < u[1])
        chance = law_of_pairs.chance(t, u)
        assert abs(float(inside.double().mean()) - chance) < 5 * (chance * (1 - chance) / B) ** 0.5


def test_a_map_shows_the_law_and_is_saved(tmp_path: Path):
    laws = [coverage(SCHEDULE, law, 11) for law in ("paper", "wide")]
    figure = maps(laws)
    panels = [panel.images[0] for panel in figure.axes[:4]]  # paper, wide; below, with logarithmic axes, the same
    for law, panel in zip([*laws, *laws], panels, strict=True):
        shown = np.ma.filled(np.ma.asarray(panel.get_array()), 0)
        low, high, _, _ = panel.get_extent()
        linear = high > 10
        edges = law.grid.numpy() if linear else law.grid.log10().numpy()
        pairs = ((5.0, 70.0), (70.0, 5.0), (20.0, 20.0)) if linear else ((0.01, 30.0), (30.0, 0.01), (0.3, 0.3))
        for t, u in pairs:
            n, n_prime = int((law.grid <= t).sum()) - 1, int((law.grid <= u).sum()) - 1
            column, row = (int((edges[i : i + 2].mean() - low) / (high - low) * len(shown)) for i in (n, n_prime))
            assert shown[row, column] == law.chances[n, n_prime]
    save(figure, str(tmp_path / "new" / "coverage.png"))
    with Image.open(tmp_path / "new" / "coverage.png") as picture:
        assert picture.format == "PNG" and len(picture.getcolors(2**20) or []) > 50
