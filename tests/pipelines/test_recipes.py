"""Every recipe builds, says what to expect of it, and works from end to end in its smoke form."""

import re
from collections.abc import Callable, Generator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import write_split

from bcm import inference, strict
from bcm.checkpoint import load_checkpoint, load_model, save_checkpoint
from bcm.cost import step_cost
from bcm.finetune import bidirectional
from bcm.inference import Toolkit
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.schedule import discretization
from bcm.timesteps import (
    CONSISTENCY_CIFAR10,
    CONSISTENCY_IMAGENET64,
    PAPER_CIFAR10,
    PAPER_CIFAR10_DEEP,
    PAPER_IMAGENET64,
    PUBLISHED,
    TimeSteps,
)
from bcm.training import TrainState, fit
from bcm.types import BCMError
from data.cache import ShardCache
from data.catalog import DATASETS
from data.loader import Batch, Loader
from data.manifest import Manifest, write_manifest
from data.order import Shuffle, shuffle_of
from data.prepare.pack import Sample
from pipelines.config import Config
from pipelines.errors import ConfigError
from pipelines.recipes import FLOPS_PER_GPU, RECIPES, recipe
from pipelines.training.describe import describe

Shards = tuple[ShardCache, Shuffle]
CLASSES = {"digits": 10, "images": 1, "cifar10": 10, "ffhq64": 1, "lsun-bedroom256": 1, "imagenet64": 1000}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_fits_its_data_set_and_its_name(name: str):
    config = recipe(name)
    assert config.recipe == name
    assert config.network.classes in (0, CLASSES[config.dataset])
    if config.dataset in DATASETS:
        known = DATASETS[config.dataset]
        assert (config.network.resolution, config.network.image_channels) == (known.resolution, known.channels)
        assert config.train.batch_size <= known.splits["train"]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_says_what_to_expect_and_how_to_start_it(name: str):
    text, config = RECIPES[name].__doc__ or "", recipe(name)
    assert "Expected" in text
    init = r" --init \S+" if config.finetunes else ""
    assert re.search(rf"Command: python -m pipelines\.train {name}{init}(?=\s|$)", text)


@pytest.mark.parametrize("wrong", ["cifar10bcm", "cifar-10-bcm", "CIFAR10-bcm"])
def test_an_unknown_recipe_names_the_nearest(wrong: str):
    with pytest.raises(ConfigError, match=f"unknown recipe '{wrong}': did you mean 'cifar10-bcm'[?] Known: digits, "):
        recipe(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_dry_run_shows_the_whole_config(name: str):
    text = describe(recipe(name))
    end = text.index("\n}\n") + 2
    assert strict.read(Config, text[:end], "dry run", complete=True) == recipe(name)
    assert f"{recipe(name).train.iterations * recipe(name).train.batch_size:,}" in text[end:]


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in RECIPES if recipe(name).scaling.gpu])
def test_the_hours_and_images_that_a_docstring_states_follow_from_the_recipe(name: str):
    config, text = recipe(name), RECIPES[name].__doc__ or ""
    stated = re.search(r"Hardware: (\d+) H100; about (\d+) hours for ([\d,.]+)M images", text)
    assert stated, text
    cost = step_cost(config.network, config.train, config.schedule, config.scaling.workers)
    hours = cost.step_flops * config.train.iterations / (config.scaling.workers * FLOPS_PER_GPU) / 3600
    assert int(stated[1]) == config.scaling.workers
    assert float(stated[2]) == pytest.approx(hours, rel=0.05)
    assert stated[3] == f"{config.train.iterations * config.train.batch_size / 1e6:,.1f}"
    assert cost.peak < 70e9


# ---- the paper's numbers


def stages(config: Config) -> list[tuple[int, int]]:
    """N, and its first iteration, found by looking at both sides of each thousandth."""
    K, found = config.train.iterations, {}
    for k in range(0, K, 1000 if K > 10_000 else 1):
        for step in (k - 1, k):
            if step >= 0:
                found.setdefault(discretization(step, K, config.schedule), step)
    return list(found.items())


@pytest.mark.parametrize("name", ["cifar10-bcm", "cifar10-bcm-deep", "cifar10-ict", "ffhq64-bcm"])
def test_the_stages_of_training_from_scratch(name: str):
    assert stages(recipe(name)) == [(10 * 2**i + 1, i * 50_000) for i in range(8)]


def test_the_uneven_stages_of_the_bedrooms():
    begins = [0, 75_000, 150_000, 210_000, 270_000, 315_000, 360_000, 390_000]
    assert stages(recipe("lsun-bedroom256-bcm")) == [(10 * 2**i + 1, k) for i, k in enumerate(begins)]
    assert recipe("lsun-bedroom256-bcm").train.iterations == 420_000


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("cifar10-ict", "56.395523"),
        ("cifar10-bcm", "61.901571"),
        ("cifar10-ict-deep", "97.6"),
        ("cifar10-bcm-deep", "106.3"),
        ("ffhq64-bcm", "61.90"),
        ("lsun-bedroom256-bcm", "72.33"),
        ("imagenet64-ict", "278.023107"),
        ("imagenet64-bcm", "279.941571"),
        ("imagenet64-ict-deep", "465.07"),
        ("imagenet64-bcm-deep", "466.99"),
    ],
)
def test_the_sizes_of_the_networks(name: str, millions: str):
    with torch.device("meta"):
        network = build_network(recipe(name).network)
    digits = len(millions.partition(".")[2])
    assert f"{sum(p.numel() for p in network.parameters()) / 1e6:.{digits}f}" == millions


@pytest.mark.parametrize(
    ("name", "steps"),
    [
        ("cifar10-bcm", PAPER_CIFAR10),
        ("cifar10-bcm-deep", PAPER_CIFAR10_DEEP),
        ("cifar10-ict", CONSISTENCY_CIFAR10),
        ("imagenet64-bcm", PAPER_IMAGENET64),
        ("imagenet64-bcm-deep", PAPER_IMAGENET64),
        ("imagenet64-ict-deep", CONSISTENCY_IMAGENET64),
    ],
)
def test_the_time_steps_that_a_recipes_model_starts_with(name: str, steps: dict[str, TimeSteps]):
    assert PUBLISHED[recipe(name).time_steps] == steps


# ---- smoke forms


@pytest.mark.parametrize("name", RECIPES)
def test_a_smoke_form_keeps_the_architecture_and_every_stage(name: str):
    full, smoke = recipe(name), recipe(name, smoke=True)
    narrower = {"width": smoke.network.width, "blocks": smoke.network.blocks}
    if "head_channels" in asdict(full.network):
        narrower["head_channels"] = asdict(smoke.network)["head_channels"]
    assert replace(full.network, **narrower) == smoke.network
    assert (smoke.train.objective, smoke.finetunes) == (full.train.objective, full.finetunes)
    K = smoke.train.iterations
    reached = {discretization(k, K, smoke.schedule) for k in range(K)}
    assert reached == {N for N, _ in stages(full)}
    with torch.device("meta"):
        assert sum(p.numel() for p in build_network(smoke.network).parameters()) < 7e6


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Config], Shards]:
    """Shards of random images of a recipe's data set, by its name and size, in a cache."""
    made: dict[str, Shards] = {}

    def make(config: Config) -> Shards:
        name, network = config.dataset, config.network
        if name not in made:
            root = tmp_path_factory.mktemp(name)
            classes = tuple(map(str, range(CLASSES[name])))
            shape = (network.resolution, network.resolution) + (3,) * (network.image_channels == 3)
            images = np.random.default_rng(0).integers(0, 256, (40, *shape), dtype=np.uint8)
            samples = [Sample(key=f"{i:03d}", image=image, label=i % len(classes)) for i, image in enumerate(images)]
            manifest = Manifest(
                name=name,
                resolution=network.resolution,
                channels=network.image_channels,
                class_names=classes,
                flip=True,
                splits={"train": write_split(str(root / "shards"), "train", samples)},
            )
            write_manifest(str(root / "shards"), manifest)
            cache = ShardCache(str(root / "shards"), manifest, "train", root / "cache")
            made[name] = cache, shuffle_of(manifest, "train")
        return made[name]

    return make


def initial(config: Config) -> BCM:
    """A model as the recipe starts with: of random weights, or made from such a one of one time."""
    torch.manual_seed(config.train.seed)
    if not config.finetunes:
        return BCM(build_network(config.network))
    name = config.recipe.removesuffix("-smoke").replace("-finetune", "-ict").replace("-bcm", "-ict")
    before = recipe(name, smoke=True).network
    model, network = bidirectional(BCM(build_network(before)), before)
    assert network == config.network
    return model


def state_of(config: Config) -> TrainState:
    return TrainState(initial(config), config.train, conditional=config.network.classes > 0)


def batches(config: Config, shards: Shards, k: int) -> Generator[Batch, None, None]:
    size, seed = config.train.batch_size, config.train.seed
    cache, shuffle = shards
    loader = Loader(cache=cache, shuffle=shuffle, batch_size=size, seed=seed, rank=0, world_size=1, flip=True)
    return loader.batches(k * size)


@pytest.mark.parametrize("name", ["cifar10-ict-deep", "cifar10-bcm-deep", "imagenet64-ict-deep", "imagenet64-bcm-deep"])
def test_a_deep_form_has_twice_the_blocks(name: str):
    deep, plain = recipe(name), recipe(name.removesuffix("-deep"))
    assert deep.network == replace(plain.network, blocks=2 * plain.network.blocks)
    assert replace(deep.train, accumulate=1, iterations=1) == replace(plain.train, accumulate=1, iterations=1)
    stated = [re.search(r"([\d,.]+)M images", RECIPES[name].__doc__ or "") for name in (name, plain.recipe)]
    for config, images in zip((deep, plain), stated, strict=True):
        assert images and images[1] == f"{config.train.iterations * config.train.batch_size / 1e6:,.1f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", RECIPES)
def test_a_smoke_form_trains_checkpoints_resumes_and_samples(
    name: str, shards: Callable[[Config], Shards], tmp_path: Path
):
    config = recipe(name, smoke=True)
    train = replace(config.train, batch_size=max(2, config.train.accumulate))
    config = replace(config, train=train, scaling=replace(config.scaling, workers=1))
    state, stream = state_of(config), batches(config, shards(config), 0)
    steps = fit(state, stream, config.train, config.schedule)
    first = next(steps)
    save_checkpoint(tmp_path, state, config.network)
    second = next(steps)
    stream.close()
    assert all(torch.isfinite(loss) for metrics in (first, second) for loss in metrics.losses.values())
    assert state.skipped == 0

    resumed = state_of(config)
    assert load_checkpoint(tmp_path, resumed, config.network).k == 1
    stream = batches(config, shards(config), resumed.k)
    again = next(fit(resumed, stream, config.train, config.schedule))
    stream.close()
    assert {name: float(loss) for name, loss in again.losses.items()} == {
        name: float(loss) for name, loss in second.losses.items()
    }
    for a, b in zip(resumed.model.parameters(), state.model.parameters(), strict=True):
        assert torch.equal(a, b)

    model, info = load_model(tmp_path)
    toolkit = Toolkit(
        model=model,
        network=info.network,
        k=info.k,
        schedules=PUBLISHED[config.time_steps],
        objective=info.objective,
    )
    labels = [0] if config.network.classes else None
    if config.train.objective == "edm":
        with pytest.raises(BCMError, match="denoiser"):
            inference.generate(toolkit, [0], 1, labels)
        return
    image = inference.generate(toolkit, [0], 1, labels)
    assert image.shape == (1, config.network.image_channels, *[config.network.resolution] * 2)
    assert image.isfinite().all()
