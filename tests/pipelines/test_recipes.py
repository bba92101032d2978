"""Every recipe builds, and says what to expect of it."""

import json
import re

import pytest
import torch

from bcm.networks import build_network
from data.catalog import facts
from pipelines.config import Config, ConfigError
from pipelines.recipes import RECIPES, recipe
from pipelines.train import describe


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_data_set_and_its_name(name: str):
    config = recipe(name)
    known = facts(config.dataset)
    assert config.recipe == name
    assert (config.network.resolution, config.network.image_channels) == (known.resolution, known.channels)
    assert config.train.batch_size <= known.splits["train"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_to_expect_and_how_to_start_it(name: str):
    text = RECIPES[name].__doc__ or ""
    assert "Expected" in text
    assert re.search(rf"Command: python -m pipelines\.train {name}( |$)", text, re.MULTILINE)


@pytest.mark.parametrize("wrong", ["cifar10bcm", "cifar-10-bcm", "CIFAR10-bcm"])
def test_an_unknown_recipe_names_the_nearest(wrong: str):
    with pytest.raises(ConfigError, match=f"unknown recipe '{wrong}': did you mean 'cifar10-bcm'[?] Known: digits, "):
        recipe(wrong)


def shown(config: Config) -> tuple[Config, dict[str, str]]:
    """What `describe` prints, read back: the config, then the facts by name."""
    text = describe(config)
    end = text.index("\n}\n") + 2
    lines = [line.split("  ", 1) for line in text[end:].strip().splitlines()]
    return Config.from_dict(json.loads(text[:end])), {key: value.strip() for key, value in lines}


@pytest.mark.parametrize("name", RECIPES)
def test_describe_shows_the_whole_config(name: str):
    config, found = shown(recipe(name))
    assert config == recipe(name)
    assert set(found) == {"parameters", "images in all", "stages"}


def test_describe_of_cifar10_matches_the_paper():
    _, found = shown(recipe("cifar10-bcm"))
    assert round(int(found["parameters"].replace(",", "")) / 1e6, 2) == 61.90
    assert found["images in all"] == "409,600,000"
    stages = [tuple(map(int, pair)) for pair in re.findall(r"N=(\d+) from step (\d+)", found["stages"])]
    assert stages == [(10 * 2**i + 1, i * 50_000) for i in range(8)]


@pytest.mark.parametrize("name", ["digits", "digits-smoke", "cifar10-bcm-smoke"])
def test_small_recipes_have_networks_for_a_laptop(name: str):
    with torch.device("meta"):
        network = build_network(recipe(name).network)
    assert sum(p.numel() for p in network.parameters()) < 3e6
