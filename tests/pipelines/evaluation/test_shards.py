"""Scores against the formulas, an image at a time; the same whether computed here or as Ray tasks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from made import Whole, cached_split, write_split
from world import World

from bcm import inference
from bcm.inference import Toolkit, save_toolkit
from bcm.metrics import Moments
from bcm.networks import build_network
from bcm.precond import BCM
from bcm.timesteps import CONSISTENCY_CIFAR10, PAPER_CIFAR10
from data.cache import ShardCache, default_cache_dir
from data.manifest import Manifest, load_manifest
from data.prepare.pack import Sample
from pipelines.evaluate import EvaluateOptions, evaluate
from pipelines.evaluation import shards
from pipelines.evaluation.features import FEATURES, as_images, pixels
from pipelines.evaluation.reference import Labeller, classifier, moments_of
from pipelines.evaluation.scores import Score
from pipelines.models.source import model_at
from pipelines.recipes import recipe
from pipelines.register import RegisterOptions, register
from pipelines.tracking import client


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The textbook formula on rows of features."""
    S_a, S_b = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    root = np.sqrt(np.linalg.eigvals(S_a @ S_b).real.clip(0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(S_a + S_b) - 2 * root)


def rows(split: Whole) -> np.ndarray:
    return split.images.reshape(len(split.labels), -1) / 255


@dataclass(frozen=True)
class Real:
    """The digits: as arrays, and as a model is measured against them."""

    train: Whole
    test: Whole
    url: str
    manifest: Manifest
    cache: ShardCache
    """The held-out images."""
    moments: Moments
    """Of the training images."""
    labeller: Labeller | None

    def named(self, scores: Sequence[Score]) -> dict[str, float]:
        return {f"{row.metric} {row.task} {row.nfe}": row.value for row in scores}


@pytest.fixture
def real(world: World) -> Real:
    url = str(world.data)
    manifest = load_manifest(url)
    train, test = (cached_split(url, manifest, split, default_cache_dir()) for split in ("train", "test"))
    caches = {split: ShardCache(url, manifest, split) for split in ("train", "test")}
    labeller = classifier(caches["train"], manifest)
    return Real(train, test, url, manifest, caches["test"], moments_of(caches["train"]), labeller)


@pytest.fixture
def toolkit(world: World) -> Toolkit:
    """Random weights with one schedule of each task."""
    schedules = {name: PAPER_CIFAR10[name] for name in ("sample-1", "sample-3", "invert-2")}
    return replace(model_at(str(world.run)).open(), schedules=schedules)


def test_pixels_are_clamped_and_lie_in_0_to_1():
    x = torch.tensor([-3.0, -1.0, 0.0, 1.0, 3.0]).reshape(1, 1, 1, 5)
    assert pixels(x).tolist() == [[0, 0, 0.5, 1, 1]]


def test_pixels_of_large_images_are_averages_of_squares():
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    found = pixels(x).reshape(2, 3, 32, 32)
    assert torch.allclose(found[1, 2, 5, 7], (x[1, 2, 10:12, 14:16].mean() + 1) / 2)
    assert pixels(torch.zeros(1, 3, 256, 256)).shape == (1, FEATURES)


def test_moments_of_a_split_are_those_of_its_images(real: Real):
    moments = real.moments
    assert moments.count == 1500
    assert np.allclose(moments.mean, rows(real.train).mean(0), atol=1e-7)
    assert np.allclose(moments.covariance, np.cov(rows(real.train), rowvar=False), atol=1e-7)


def test_real_images_as_samples_are_at_no_distance(real: Real):
    halves = [Moments.of(pixels(as_images(real.train.images[i : i + 750]))) for i in (0, 750)]
    assert shards.sample_distance(halves[0] + halves[1], real.moments) == pytest.approx(0, abs=1e-6)
    between = shards.sample_distance(moments_of(real.cache), real.moments)
    assert between == pytest.approx(frechet(rows(real.test), rows(real.train)), rel=1e-4)
    assert between > 0.1


def test_samples_that_are_not_finite_are_infinitely_far(real: Real):
    train = real.moments
    assert shards.sample_distance(train + Moments.of(torch.full((4, 64), math.nan)), train) == math.inf


def test_the_labeller_knows_the_held_out_digits(real: Real):
    assert real.labeller is not None
    assert np.mean(real.labeller(as_images(real.test.images)) == real.test.labels) > 0.97


def test_large_images_have_no_labeller(tmp_path: Path):
    images = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)
    samples = [Sample(key=f"s{i}", image=image, label=i % 3) for i, image in enumerate(images)]
    splits = {split: write_split(str(tmp_path), split, samples) for split in ("train", "test")}
    names = ("a", "b", "c")
    manifest = Manifest(name="x", resolution=16, channels=3, class_names=names, flip=False, splits=splits)
    assert classifier(ShardCache(str(tmp_path), manifest, "train"), manifest) is None


def test_sample_moments_are_those_of_the_samples(toolkit: Toolkit):
    made = torch.cat([inference.generate(toolkit, range(start, start + 5), 3) for start in (5, 10, 15, 20)])
    found = shards.sample_moments(toolkit, list(range(5, 25)), 3)
    assert torch.allclose(found.mean, pixels(made).double().mean(0), atol=1e-6)
    assert torch.allclose(found.outer, pixels(made).double().T @ pixels(made).double(), atol=1e-4)


@pytest.mark.slow
def test_every_score_equals_its_slow_reference(toolkit: Toolkit, real: Real, ray_session: None):
    labeller = real.labeller
    assert labeller is not None
    scores = shards.score_model(toolkit, real.url, real.manifest, samples=300)  # more than one batch
    values = real.named(scores)
    wanted = ["fd-pixels real 0", "fd-pixels sample 1", "fd-pixels sample 3", "mse reconstruct 2"]
    assert list(values) == [*wanted, "labels-kept reconstruct 2"]
    assert values["fd-pixels real 0"] == pytest.approx(frechet(rows(real.test), rows(real.train)), rel=1e-4)
    for nfe in (1, 3):
        made = pixels(inference.generate(toolkit, range(300), nfe)).double().numpy()
        assert values[f"fd-pixels sample {nfe}"] == pytest.approx(frechet(made, rows(real.train)), rel=1e-4)
    x = as_images(real.test.images)
    back = inference.reconstruct(toolkit, x, range(297), 2)
    errors = ((pixels(back) - pixels(x)).double() ** 2).mean(1)
    kept = np.array([labeller(back[i : i + 1])[0] == labeller(x[i : i + 1])[0] for i in range(297)])
    by_name = {row.metric: row for row in scores}
    assert by_name["mse"].value == pytest.approx(float(errors.mean()), rel=1e-5)
    assert by_name["mse"].error == pytest.approx(float(errors.std()) / 297**0.5, rel=1e-4)
    assert by_name["labels-kept"].value == pytest.approx(kept.mean(), abs=2 / 297)
    assert by_name["labels-kept"].error == pytest.approx(kept.std() / 297**0.5, abs=2e-3)
    assert (by_name["mse"].count, by_name["mse"].seeds, by_name["mse"].extractor) == (297, (0, 296), None)
    sampled = scores[2]
    assert (sampled.count, sampled.seeds, sampled.extractor) == (300, (0, 299), f"pixels-{FEATURES}")
    assert sampled.steps == toolkit.schedules["sample-3"]
    (some, _) = shards.score_reconstructions(toolkit, real.cache, labeller, 260)
    assert some.value == pytest.approx(float(errors[:260].mean()), rel=1e-5)
    names = client.score_names(scores)
    assert names["frechet_test"] == values["fd-pixels real 0"] and names["mse_nfe2"] == values["mse reconstruct 2"]
    assert names["frechet_ratio_nfe3"] == pytest.approx(values["fd-pixels sample 3"] / values["fd-pixels real 0"])
    assert set(names) == {
        *("frechet_test", "frechet_nfe1", "frechet_nfe3", "frechet_ratio_nfe1", "frechet_ratio_nfe3"),
        *("mse_nfe2", "labels_kept_nfe2"),
    }


@pytest.mark.slow
def test_a_model_that_gives_no_finite_images_is_scored_all_the_same(toolkit: Toolkit, real: Real, ray_session: None):
    next(toolkit.model.parameters()).fill_(math.nan)
    assert [row.value for row in shards.score_samples(toolkit, real.moments, 10)] == [math.inf, math.inf]
    assert math.isnan(shards.score_reconstructions(toolkit, real.cache, real.labeller, 20)[0].value)


@pytest.mark.slow
def test_a_model_of_its_own_and_of_one_time_is_scored_stored_and_registered(world: World, real: Real):
    network = replace(recipe("digits", smoke=True).network, times=1, classes=10)
    torch.manual_seed(0)
    model = BCM(build_network(network)).eval().requires_grad_(False)
    url = str(world.root / "ict")
    toolkit = Toolkit(model=model, network=network, k=7, schedules=CONSISTENCY_CIFAR10, objective="ct")
    save_toolkit(Path(url), toolkit)

    values = real.named(evaluate(EvaluateOptions(model=url, data=str(world.data), samples=40)))
    assert list(values) == ["fd-pixels real 0", "fd-pixels sample 1", "fd-pixels sample 2"]
    x = inference.generate(toolkit, range(40), 2, [seed % 10 for seed in range(40)])
    distance = frechet(pixels(x).double().numpy(), rows(real.train))
    assert values["fd-pixels sample 2"] == pytest.approx(distance, rel=1e-4)

    registered = register(RegisterOptions(run=url, name="digits-ict"))
    assert registered and (registered.name, registered.version, registered.is_champion) == ("digits-ict", "1", True)
    served = model_at("models:/digits-ict@champion").open()
    assert (served.network, served.k, served.schedules) == (network, 7, CONSISTENCY_CIFAR10)
    version = client.connect(world.mlflow).get_model_version("digits-ict", "1")
    assert version.tags["imported"] == url
    assert float(version.tags["score.frechet_nfe2"]) == values["fd-pixels sample 2"]
