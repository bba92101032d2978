"""Scores against the formulas, an image at a time; the same whether computed here or as Ray tasks."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import Whole, cached_split
from world import World

from bcm import inference
from bcm.inference import Toolkit, save_toolkit
from bcm.metrics import Moments
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.timesteps import CONSISTENCY_CIFAR10, PAPER_CIFAR10
from data.cache import default_cache_dir
from data.manifest import load_manifest
from pipelines.evaluate import EvaluateOptions, evaluate
from pipelines.evaluation import scoring
from pipelines.evaluation.scoring import BATCH, FEATURES, Held, images_of, moments_of, pixels
from pipelines.models import source as models
from pipelines.recipes import recipe
from pipelines.register import RegisterOptions, register
from pipelines.tracking import client as tracking


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula on rows of features."""
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(S_a @ S_b).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a + S_b) - 2 * root)


def rows(split: Whole) -> np.ndarray:
    return split.images.reshape(len(split.labels), -1) / 255


@pytest.fixture
def train_and_test(world: World) -> tuple[Whole, Whole]:
    manifest = load_manifest(str(world.data))
    train, test = (cached_split(str(world.data), manifest, split, default_cache_dir()) for split in ("train", "test"))
    return train, test


@pytest.fixture
def toolkit(world: World) -> Toolkit:
    """Random weights with one schedule of each task."""
    schedules = {name: PAPER_CIFAR10[name] for name in ("sample-1", "sample-3", "invert-2")}
    return replace(models.open_model(str(world.run)), schedules=schedules)


def test_pixels_are_clamped_and_lie_in_0_to_1():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 5)
    assert pixels(x).tolist() == [[0, 0, 0.5, 1, 1]]


def test_pixels_of_large_images_are_averages_of_squares():
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = pixels(x).reshape(2, 3, 32, 32)
    assert torch.allclose(found[1, 2, 5, 7], (x[1, 2, 10:12, 14:16].mean() + 1) / 2)
    assert pixels(torch.zeros(1, 3, 256, 256)).shape == (1, FEATURES)


def test_images_of_a_split_are_its_pixels(train_and_test: tuple[Whole, Whole]):
    train, _ = train_and_test
    x = images_of(train, 10, 13)
    assert (x.shape, x.dtype) == ((3, 1, 8, 8), torch.float32)
    assert np.allclose(pixels(x).numpy(), rows(train)[10:13], atol=1e-7)


def test_moments_in_batches_are_those_of_the_whole(train_and_test: tuple[Whole, Whole]):
    train, _ = train_and_test
    assert len(train.labels) > 2 * BATCH
    found = moments_of(train)
    assert found.count == 1500
    assert np.allclose(found.mean, rows(train).mean(0), atol=1e-7)
    assert np.allclose(found.covariance, np.cov(rows(train), rowvar=False), atol=1e-7)


def test_real_images_as_samples_are_at_no_distance(train_and_test: tuple[Whole, Whole]):
    train, test = train_and_test
    halves = [Moments.of(pixels(images_of(train, i, i + 750))) for i in (0, 750)]
    assert scoring.sample_distance(halves[0] + halves[1], moments_of(train)) == pytest.approx(0, abs=1e-6)
    between = scoring.sample_distance(moments_of(test), moments_of(train))
    assert between == pytest.approx(frechet(rows(test), rows(train)), rel=1e-4)
    assert between > 0.1


def test_samples_that_are_not_finite_are_infinitely_far(train_and_test: tuple[Whole, Whole]):
    train, _ = train_and_test
    broken = Moments.of(torch.full((4, 64), math.nan))
    assert scoring.sample_distance(moments_of(train) + broken, moments_of(train)) == math.inf


def test_the_labeller_knows_the_held_out_digits(train_and_test: tuple[Whole, Whole]):
    train, test = train_and_test
    real = scoring.held(train, test)
    assert real.labeller is not None
    assert np.mean(real.labeller(images_of(test)) == test.labels) > 0.97


def test_large_images_have_no_labeller():
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 16, 16), dtype=np.uint8)
    split = Whole(images=images, labels=np.arange(12) % 3)
    assert scoring.held(split, split).labeller is None


def test_sample_moments_are_those_of_the_samples(toolkit: Toolkit):
    made = torch.cat([inference.generate(toolkit, range(start, start + 5), 3) for start in (5, 10, 15, 20)])
    found = scoring.sample_moments(toolkit, list(range(5, 25)), 3)
    assert torch.allclose(found.mean, pixels(made).double().mean(0), atol=1e-6)
    assert torch.allclose(found.outer, pixels(made).double().T @ pixels(made).double(), atol=1e-4)


@pytest.mark.slow
def test_every_score_equals_its_slow_reference(
    toolkit: Toolkit, train_and_test: tuple[Whole, Whole], ray_session: None
):
    train, test = train_and_test
    real = scoring.held(train, test)
    assert real.labeller is not None
    scores = scoring.score_model(toolkit, real, samples=300)  # more than one batch

    names = {f"{kind}_nfe{nfe}" for nfe in (1, 3) for kind in ("frechet", "frechet_ratio")}
    assert set(scores) == names | {"frechet_test", "mse_nfe2", "labels_kept_nfe2"}
    assert scores["frechet_test"] == pytest.approx(frechet(rows(test), rows(train)), rel=1e-4)
    for nfe in (1, 3):
        made = pixels(inference.generate(toolkit, range(300), nfe)).double().numpy()
        assert scores[f"frechet_nfe{nfe}"] == pytest.approx(frechet(made, rows(train)), rel=1e-4)
        ratio = scores[f"frechet_nfe{nfe}"] / scores["frechet_test"]
        assert scores[f"frechet_ratio_nfe{nfe}"] == pytest.approx(ratio)
    x = images_of(test)
    back = inference.reconstruct(toolkit, x, range(297), 2)
    error = ((pixels(back) - pixels(x)).double() ** 2).mean()
    assert scores["mse_nfe2"] == pytest.approx(float(error), rel=1e-5)
    kept = [real.labeller(back[i : i + 1])[0] == real.labeller(x[i : i + 1])[0] for i in range(297)]
    assert scores["labels_kept_nfe2"] == pytest.approx(np.mean(kept), abs=2 / 297)
    some = scoring.score_reconstructions(toolkit, real, [2], 260)
    few = ((pixels(back[:260]) - pixels(x[:260])).double() ** 2).mean()
    assert some["mse_nfe2"] == pytest.approx(float(few), rel=1e-5)


@pytest.mark.slow
def test_a_model_that_gives_no_finite_images_is_scored_all_the_same(
    toolkit: Toolkit, train_and_test: tuple[Whole, Whole], ray_session: None
):
    train, test = train_and_test
    next(toolkit.model.parameters()).fill_(math.nan)
    few = Whole(images=test.images[:20], labels=test.labels[:20])
    real = Held(moments_of(train), few, scoring.held(train, few).labeller)
    assert scoring.score_samples(toolkit, real.train, [1], 10) == {1: math.inf}
    assert math.isnan(scoring.score_reconstructions(toolkit, real, [2])["mse_nfe2"])


@pytest.mark.slow
def test_a_model_of_its_own_and_of_one_time_is_scored_stored_and_registered(world: World, ray_session: None):
    network = replace(recipe("digits-smoke").network, times=1, classes=10)
    torch.manual_seed(0)
    model = BCM(build_network(network)).eval().requires_grad_(False)
    url = str(world.root / "ict")
    toolkit = Toolkit(model=model, network=network, k=7, schedules=CONSISTENCY_CIFAR10)
    save_toolkit(Path(url), toolkit, {"objective": "ct"})

    scores = evaluate(EvaluateOptions(model=url, data=str(world.data), samples=40))
    names = {f"{kind}_nfe{nfe}" for nfe in (1, 2) for kind in ("frechet", "frechet_ratio")}
    assert set(scores) == names | {"frechet_test"}
    x = inference.generate(toolkit, range(40), 2, [seed % 10 for seed in range(40)])
    train = cached_split(str(world.data), load_manifest(str(world.data)), "train", default_cache_dir())
    assert scores["frechet_nfe2"] == pytest.approx(frechet(pixels(x).double().numpy(), rows(train)), rel=1e-4)

    name, registered = register(RegisterOptions(run=url, name="digits-ict"))
    assert (name, registered.version, registered.is_champion) == ("digits-ict", "1", True)
    found = models.open_model("models:/digits-ict@champion")
    assert (found.network, found.k, found.schedules) == (network, 7, CONSISTENCY_CIFAR10)
    version = tracking.connect(world.mlflow).get_model_version("digits-ict", "1")
    assert version.tags["imported"] == url
    assert float(version.tags["score.frechet_nfe2"]) == scores["frechet_nfe2"]
