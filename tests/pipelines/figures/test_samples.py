"""The rows of a picture: what is drawn of a model, and that each row shows what its caption says."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from world import Command, World

from bcm import inference
from bcm.inference import Toolkit
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.timesteps import CONSISTENCY_CIFAR10, PAPER_CIFAR10, TimeSteps
from bcm.types import BCMError
from pipelines.figures.grid import CAPTION_WIDTH, noise_as_image
from pipelines.figures.samples import generated, inverted, steps_to_draw

NETWORK = NCSNppConfig(image_channels=1, resolution=8, width=8, channel_mult=(1,), blocks=1, attention=(), dropout=0.0)


def random_toolkit(schedules: dict[str, TimeSteps], **changes: int) -> Toolkit:
    torch.manual_seed(0)
    network = replace(NETWORK, **changes)
    model = BCM(build_network(network))
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return Toolkit(model=model.eval().requires_grad_(False), network=network, k=0, schedules=schedules)


def test_one_task_is_drawn_with_the_nfe_asked_for_or_the_most():
    toolkit = random_toolkit(PAPER_CIFAR10)
    assert steps_to_draw(toolkit, "generate", 2) == [PAPER_CIFAR10["sample-2"]]
    assert steps_to_draw(toolkit, "generate") == [PAPER_CIFAR10["sample-4"]]
    assert steps_to_draw(toolkit, "invert") == [PAPER_CIFAR10["invert-4"]]


def test_all_draws_every_nfe_in_order_and_inverts_where_the_model_does():
    backwards = dict(reversed(PAPER_CIFAR10.items()))
    names = [f"sample-{nfe}" for nfe in (1, 2, 3, 4)]
    assert steps_to_draw(random_toolkit(backwards), "all") == [PAPER_CIFAR10[name] for name in (*names, "invert-4")]
    without_4 = {name: steps for name, steps in backwards.items() if name != "invert-4"}
    assert steps_to_draw(random_toolkit(without_4), "all")[-1] == PAPER_CIFAR10["invert-2"]
    ict = random_toolkit(CONSISTENCY_CIFAR10, times=1)
    assert steps_to_draw(ict, "all") == list(CONSISTENCY_CIFAR10.values())
    with pytest.raises(BCMError, match="denoiser"):
        steps_to_draw(replace(ict, objective="edm"), "all")


def test_new_images_have_the_class_asked_for_or_that_of_their_seed():
    toolkit = random_toolkit(PAPER_CIFAR10, classes=3)
    row = generated(toolkit, 2, range(4, 7))
    assert row.caption == "samples\nNFE 2"
    assert torch.equal(row.images, inference.generate(toolkit, [4, 5, 6], 2, [1, 2, 0]))
    assert torch.equal(generated(toolkit, 2, [4, 5], label=2).images, inference.generate(toolkit, [4, 5], 2, [2, 2]))


@pytest.mark.parametrize("classes", [0, 3])
def test_inverted_images_stand_above_their_noise_and_reconstructions(classes: int):
    toolkit = random_toolkit(PAPER_CIFAR10, classes=classes)
    x = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1
    originals, noise, reconstructions = inverted(toolkit, x, [2, 0], 2, [7, 8])
    labels = [2, 0] if classes else None
    assert torch.equal(originals.images, x)
    assert torch.equal(noise.images, noise_as_image(inference.invert(toolkit, x, [7, 8], 2, labels), 80.0))
    assert torch.equal(reconstructions.images, inference.reconstruct(toolkit, x, [7, 8], 2, labels))


@pytest.mark.parametrize(("task", "rows"), [("generate", 1), ("invert", 3), ("all", 7)])
def test_the_command_draws_the_rows_of_its_task(command: Command, world: World, task: str, rows: int):
    outcome = command("sample", str(world.run), "--task", task, "--count", "3", "--out", "new/picture.png")
    assert (outcome.code, outcome.err, outcome.out) == (0, "", "wrote new/picture.png\n")
    with Image.open(Path("new/picture.png")) as picture:
        assert picture.size == (CAPTION_WIDTH + 3 * 51 + 3, rows * 51 + 3)
