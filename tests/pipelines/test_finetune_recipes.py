"""The recipes that fine-tune: those of their consistency models, in the paper's stages."""

from dataclasses import replace

import pytest

from bcm.networks import NCSNppConfig
from bcm.schedule import discretization
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.recipes import RECIPES, recipe

FINETUNING = [name for name, make in RECIPES.items() if make().finetunes]


@pytest.mark.parametrize("name", FINETUNING)
def test_a_fine_tuning_recipe_continues_that_of_its_consistency_model(name: str):
    """What the paper changes is the second time and the grid; all the rest stays (Appendix C.1)."""
    config = recipe(name)
    before = recipe(name.replace("-finetune", "-ict").replace("-bcm", "-ict"))
    same_network = {"times": 2} | ({"embedding": "projected"} if isinstance(config.network, NCSNppConfig) else {})
    assert config.network == replace(before.network, **same_network)
    for field in ("batch_size", "learning_rate", "ema_rates", "precision"):
        assert getattr(config.train, field) == getattr(before.train, field)
    assert len(stages(config)) == 3


def stages(config: Config) -> dict[int, int]:
    K, found = config.train.iterations, {}
    for k in range(0, K, max(1, K // 1000)):
        found.setdefault(discretization(k, K, config.schedule), k)
    return found


def test_the_papers_stages_of_fine_tuning():
    assert recipe("imagenet64-bcm").train.iterations == 210_000 + 16_000 + 8_000
    assert recipe("imagenet64-bcm-deep").train.iterations == 360_000 + 100_000 + 10_000
    for name, ends in (("imagenet64-bcm", (210_000, 226_000)), ("imagenet64-bcm-deep", (360_000, 460_000))):
        config = recipe(name)
        K = config.train.iterations
        steps = (0, ends[0] - 1, ends[0], ends[1] - 1, ends[1], K - 1)
        assert [discretization(k, K, config.schedule) for k in steps] == [320, 320, 480, 480, 640, 640]


def test_stages_that_training_would_not_reach_are_refused():
    config = recipe("imagenet64-bcm")
    with pytest.raises((ConfigError, ValueError), match="N=640"):
        replace(config, train=replace(config.train, iterations=1000))
