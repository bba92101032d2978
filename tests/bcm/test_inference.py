"""Generation and inversion from integer seeds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bcm import inference, inversion, rng, samplers
from bcm.inference import Toolkit, load_toolkit, save_toolkit
from bcm.networks import NCSNppConfig, NetworkConfig, build_network
from bcm.precond import BCM
from bcm.timesteps import CONSISTENCY_CIFAR10, PAPER_CIFAR10, Ancestral, Inversion, Multistep
from bcm.types import BCMError

NETWORK = NCSNppConfig(
    image_channels=1, resolution=8, width=8, channel_mult=(1, 2), blocks=1, attention=(4,), dropout=0.0
)
SEEDS = [3, 2**40, 0]
X = torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1


def toolkit(network: NetworkConfig = NETWORK) -> Toolkit:
    torch.manual_seed(0)
    model = BCM(build_network(network))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return Toolkit(
        model=model.eval(), network=network, k=7, schedules=CONSISTENCY_CIFAR10 if network.times == 1 else PAPER_CIFAR10
    )


TOOLKIT = toolkit()


def noise(stream: rng.Stream, step: int = 0) -> torch.Tensor:
    return rng.normal(0, stream, step, torch.tensor(SEEDS), (1, 8, 8))


@pytest.mark.parametrize("nfe", [1, 2, 3, 4])
def test_generate_samples_with_the_schedule_of_that_nfe_and_the_noise_of_the_seeds(nfe: int):
    expected = samplers.sample(
        TOOLKIT.model,
        noise(rng.Stream.SAMPLE),
        PAPER_CIFAR10[f"sample-{nfe}"],
        lambda n: noise(rng.Stream.RENOISE, n),
    )
    assert torch.equal(inference.generate(TOOLKIT, SEEDS, nfe), expected)


@pytest.mark.parametrize("nfe", [1, 2, 4])
def test_invert_and_reconstruct_follow_the_schedule_of_that_nfe(nfe: int):
    steps = PAPER_CIFAR10[f"invert-{nfe}"]
    assert isinstance(steps, Inversion)
    sigma = noise(rng.Stream.INVERSION)
    x_T = inversion.invert(TOOLKIT.model, X, steps, sigma)
    assert torch.equal(inference.invert(TOOLKIT, X, SEEDS, nfe), x_T)
    assert torch.equal(
        inference.reconstruct(TOOLKIT, X, SEEDS, nfe), inversion.reconstruct(TOOLKIT.model, X, steps, sigma)
    )


def test_a_row_depends_on_its_seed_and_not_on_its_batch():
    whole = inference.generate(TOOLKIT, SEEDS, 4)
    for row, seed in enumerate(SEEDS):
        torch.testing.assert_close(inference.generate(TOOLKIT, [seed], 4)[0], whole[row], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(whole[0], whole[1], atol=1e-2)


def test_nfe_0_takes_the_schedule_with_the_most_calls():
    only = replace(TOOLKIT, schedules={"invert-2": PAPER_CIFAR10["invert-2"]})
    assert inference.steps_for(TOOLKIT, "sample").nfe == 4
    assert inference.steps_for(only, "invert") == PAPER_CIFAR10["invert-2"]


@pytest.mark.parametrize("nfe", [3, -1])
def test_a_missing_schedule_is_an_error_that_names_the_others(nfe: int):
    with pytest.raises(BCMError, match=rf"no time steps 'invert-{nfe}'; it has invert-1, invert-2, invert-4\."):
        inference.steps_for(TOOLKIT, "invert", nfe)
    with pytest.raises(BCMError, match=r"no time steps 'sample-0'; it has none\."):
        inference.steps_for(replace(TOOLKIT, schedules={}), "sample")


def test_a_schedule_under_a_wrong_name_is_refused():
    with pytest.raises(BCMError, match=r"'sample-2' holds .* whose name is 'sample-1'"):
        replace(TOOLKIT, schedules={"sample-2": Ancestral()})
    with pytest.raises(BCMError, match="whose name is 'invert-1'"):
        replace(TOOLKIT, schedules={"sample-1": PAPER_CIFAR10["invert-1"]})


def test_labels_are_needed_by_a_conditional_model_alone():
    conditional = toolkit(replace(NETWORK, classes=10))
    by_class = [inference.generate(conditional, [1], 1, [label]) for label in (0, 9)]
    assert not torch.equal(*by_class)
    for labels in (None, [10], [-1], [1, 2]):
        with pytest.raises(BCMError, match=r"needs one label in \[0, 10\)"):
            inference.generate(conditional, [1], 1, labels)
    with pytest.raises(BCMError, match="knows no labels"):
        inference.generate(TOOLKIT, [1], 1, [0])


@pytest.mark.parametrize("seeds", [[-1], [2**48]])
def test_seeds_out_of_range_are_refused(seeds: list[int]):
    with pytest.raises(BCMError, match="leave the range"):
        inference.generate(TOOLKIT, seeds, 1)


@pytest.mark.parametrize("x", [X[:2], X[..., :4], X.expand(3, 3, 8, 8)])
def test_images_of_another_shape_are_refused(x: torch.Tensor):
    with pytest.raises(BCMError, match=r"3 seeds need \(3, 1, 8, 8\)"):
        inference.reconstruct(TOOLKIT, x, SEEDS, 1)


def test_a_saved_toolkit_generates_the_same_images(tmp_path: Path):
    save_toolkit(tmp_path / "model", TOOLKIT)
    loaded = load_toolkit(tmp_path / "model")
    assert (loaded.network, loaded.k, loaded.schedules) == (NETWORK, 7, PAPER_CIFAR10)
    assert torch.equal(inference.generate(loaded, SEEDS, 4), inference.generate(TOOLKIT, SEEDS, 4))
    assert {path.suffix for path in (tmp_path / "model").iterdir()} == {".safetensors", ".json"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("{", "not valid JSON"),
        ("[]", "should be an object"),
        ('{"sample-1": 3}', "sample-1"),
        ('{"sample-1": {"kind": "x", "times": [1]}}', r"sample-1\.kind"),
    ],
)
def test_damaged_schedules_are_refused(tmp_path: Path, text: str | None, said: str):
    save_toolkit(tmp_path, TOOLKIT)
    path = tmp_path / inference.SCHEDULES
    assert json.loads(path.read_text())["sample-1"]["kind"] == "ancestral"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(BCMError, match=said):
        load_toolkit(tmp_path)


# ---- models of one time

ICT = toolkit(replace(NETWORK, times=1, classes=3))


def test_a_model_of_one_time_samples_in_one_step_and_in_several():
    label = torch.tensor([0, 2, 1])
    x_T, to_0 = 80.0 * noise(rng.Stream.SAMPLE), torch.full((3,), 0.002)
    one = ICT.model(x_T, torch.full((3,), 80.0), to_0, label)
    assert torch.allclose(inference.generate(ICT, SEEDS, 1, [0, 2, 1]), one, atol=1e-6)
    x_tau = one + (0.821**2 - 0.002**2) ** 0.5 * noise(rng.Stream.RENOISE, 0)
    two = ICT.model(x_tau, torch.full((3,), 0.821), to_0, label)
    assert torch.allclose(inference.generate(ICT, SEEDS, 2, [0, 2, 1]), two, atol=1e-5)
    with pytest.raises(BCMError, match=r"needs one label in \[0, 3\)"):
        inference.generate(ICT, SEEDS, 2, [0, 3, 1])


@pytest.mark.parametrize("task", [inference.invert, inference.reconstruct])
def test_a_model_of_one_time_has_no_inverse_direction(task):
    with pytest.raises(BCMError, match=r"no inverse direction: it reads one time .* bidirectional model"):
        task(ICT, X, SEEDS, 0, [0, 1, 2])


@pytest.mark.parametrize("name", ["sample-2", "sample-3", "sample-4", "invert-2"])
def test_a_model_of_one_time_follows_no_time_steps_that_need_two(name: str):
    with pytest.raises(BCMError, match=rf"'{name}' holds .* only maps to time 0: it follows multistep time steps"):
        replace(ICT, schedules={name: PAPER_CIFAR10[name]})


def test_a_bidirectional_model_follows_multistep_time_steps_too():
    steps = Multistep(times=(0.5, 2.0, 80.0))
    model = replace(TOOLKIT, schedules={"sample-3": steps})
    expected = samplers.sample(model.model, noise(rng.Stream.SAMPLE), steps, lambda n: noise(rng.Stream.RENOISE, n))
    assert torch.equal(inference.generate(model, SEEDS, 3), expected)


def test_a_denoiser_makes_no_samples():
    denoiser = replace(ICT, objective="edm")
    for call in (
        lambda: inference.generate(denoiser, SEEDS, 1, [0, 1, 2]),
        lambda: inference.invert(denoiser, X, SEEDS, 0, [0, 1, 2]),
        lambda: inference.check_task(denoiser, "sample"),
    ):
        with pytest.raises(BCMError, match=r"denoiser \(objective edm\).* consistency model"):
            call()


@pytest.mark.parametrize("objective", ["", "edm", "ct"])
def test_a_checkpoint_says_what_its_weights_were_trained_for(tmp_path: Path, objective: str):
    save_toolkit(tmp_path, replace(ICT, objective=objective))
    loaded = load_toolkit(tmp_path)
    assert (loaded.objective, loaded.denoiser) == (objective, objective == "edm")
    assert loaded.schedules == CONSISTENCY_CIFAR10


def test_a_model_whose_dropout_is_on_is_refused():
    network = replace(NETWORK, dropout=0.5)
    model = BCM(build_network(network))
    with pytest.raises(BCMError, match=r"two equal calls differ; give model\.eval\(\)"):
        Toolkit(model=model, network=network, k=0, schedules=PAPER_CIFAR10)
    chosen = Toolkit(model=model.eval(), network=network, k=0, schedules=PAPER_CIFAR10)
    assert torch.equal(inference.generate(chosen, SEEDS, 2), inference.generate(chosen, SEEDS, 2))
