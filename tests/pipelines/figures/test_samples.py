"""The rows of a picture: what is drawn of a model, and that each row shows what its caption says."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from world import NAME, Command, World

from bcm import inference
from bcm.inference import Toolkit
from bcm.networks import NCSNppConfig, build_network
from bcm.precond import BCM
from bcm.timesteps import CONSISTENCY_CIFAR10, PAPER_CIFAR10, TimeSteps
from bcm.types import BCMError, to_uint8
from pipelines.figures.files import write_arrays
from pipelines.figures.grid import CAPTION_WIDTH, noise_as_image
from pipelines.figures.samples import drawn, generated, inverted, steps_to_draw
from pipelines.models.source import model_at

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


@pytest.mark.parametrize(("task", "lines", "columns"), [("generate", 2, 2), ("invert", 3, 3), ("all", 7, 3)])
def test_the_command_draws_the_rows_of_its_task(command: Command, world: World, task: str, lines: int, columns: int):
    outcome = command("sample", str(world.run), "--task", task, "--count", "3", "--out", "new/picture.png")
    assert (outcome.code, outcome.err, outcome.out) == (0, "", "wrote new/picture.png\n")
    with Image.open(Path("new/picture.png")) as picture:
        assert picture.size == (CAPTION_WIDTH + columns * 131 + 3, lines * 131 + 3)


def test_tasks_and_models_have_pictures_of_their_own(command: Command, world: World):
    for task in ("generate", "invert", "all"):
        assert command("sample", str(world.run), "--task", task, "--count", "2").code == 0
    assert {path.name for path in Path("runs/pictures").iterdir()} == {
        f"{NAME}-{task}.png" for task in ("generate", "invert", "all")
    }
    assert command("sample", str(world.run), "--nfe", "2", "--format", "npz").code == 0
    assert Path(f"runs/pictures/{NAME}-generate-nfe2.npz").is_file()


def test_more_images_than_there_are_are_refused(command: Command, world: World):
    error = command("sample", str(world.run), "--task", "invert", "--count", "298").error
    assert f"{world.data} holds 297 held-out images, fewer than 298. Give a smaller --count" in error


def test_many_images_become_a_file_each_named_after_its_seed(command: Command, world: World):
    line = ("sample", str(world.run), "--count", "260", "--seed", "7", "--nfe", "1")
    assert command(*line, "--out", "new folder").code == 0
    assert {path.name for path in Path("new folder").iterdir()} == {f"{seed:06d}.png" for seed in range(7, 267)}
    x = to_uint8(inference.generate(model_at(str(world.run)).open(), [7, 266], 1))[:, 0].numpy()
    for seed, pixels in zip((7, 266), x, strict=True):
        with Image.open(f"new folder/{seed:06d}.png") as image:
            assert np.array_equal(np.asarray(image), pixels)
    assert command("sample", str(world.run), "--task", "invert", "--count", "2", "--out", "parts").code == 0
    assert sorted(path.name for path in Path("parts").iterdir()) == [
        "held-out-images",
        "reconstructions-nfe-1",
        "their-noise-nfe-4",
    ]


def test_an_array_is_what_evaluators_read(command: Command, world: World):
    assert command("sample", str(world.run), "--count", "260", "--nfe", "1", "--out", "a.npz").code == 0
    with np.load("a.npz", allow_pickle=False) as arrays:
        assert arrays.files == ["arr_0"]
        pixels = arrays["arr_0"]
    assert (pixels.dtype, pixels.shape) == (np.uint8, (260, 8, 8, 3))
    x = to_uint8(inference.generate(model_at(str(world.run)).open(), [0, 259], 1)).numpy()
    assert np.array_equal(pixels[[0, 259]], np.broadcast_to(x.transpose(0, 2, 3, 1), (2, 8, 8, 3)))


def test_an_array_of_a_model_with_classes_has_them(tmp_path: Path):
    toolkit = random_toolkit(PAPER_CIFAR10, classes=3)
    write_arrays(drawn(toolkit, steps_to_draw(toolkit, "generate", 1), range(4, 8)), str(tmp_path / "a.npz"))
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["arr_1"].tolist() == [1, 2, 0, 1]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--out x.tiff --format grid", "ends in .png, .jpg"),
        ("--out x.png --format png", "give the name of a folder"),
        ("--out x.npz --format grid", "ends in .png, .jpg"),
    ],
)
def test_a_name_that_does_not_fit_is_refused(command: Command, world: World, options: str, said: str):
    before = set(world.root.iterdir())
    outcome = command("sample", str(world.run), *options.split())
    assert outcome.code == 2 and said in " ".join(outcome.err.replace("│", " ").split())
    assert set(world.root.iterdir()) == before
