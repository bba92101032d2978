"""Pictures show each image's own pixels in its place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bcm.types import to_uint8
from pipelines.errors import ConfigError
from pipelines.figures.grid import CAPTION_WIDTH, Row, grid, noise_as_image, save


def images(count: int, channels: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2


@pytest.mark.parametrize(("channels", "side", "size"), [(1, 8, 48), (3, 8, 48), (3, 32, 32), (1, 20, 40), (3, 64, 64)])
def test_each_image_stands_enlarged_in_its_place(channels: int, side: int, size: int):
    rows = [Row("one", images(3, channels, side, seed=1)), Row("two\nlines", images(2, channels, side, seed=2))]
    gap = 3
    picture = grid(rows, side=48, gap=gap)
    assert picture.size == (CAPTION_WIDTH + 3 * (size + gap) + gap, 2 * (size + gap) + gap)
    pixels = np.asarray(picture)
    for i, row in enumerate(rows):
        top = gap + i * (size + gap)
        for j, image in enumerate(to_uint8(row.images).numpy()):
            left = CAPTION_WIDTH + gap + j * (size + gap)
            tile = pixels[top : top + size, left : left + size]
            enlarged = image.repeat(size // side, axis=1).repeat(size // side, axis=2).transpose(1, 2, 0)
            assert np.array_equal(tile, np.broadcast_to(enlarged, tile.shape))


def test_what_no_image_covers_is_white_but_for_the_captions():
    picture = grid([Row("name", images(2, 1, 8)), Row("", images(1, 1, 8))])
    pixels = np.asarray(picture)
    assert (pixels[:3] == 255).all() and (pixels[-3:] == 255).all()
    assert (pixels[3:51, :CAPTION_WIDTH] < 128).any()
    assert (pixels[54:102, :CAPTION_WIDTH] == 255).all()
    assert (pixels[54:102, CAPTION_WIDTH + 54 :] == 255).all()


def test_noise_is_shown_in_units_of_its_own_scale():
    T = 80.0
    x_T = T * torch.tensor([-10.0, -3.0, -1.5, 0.0, 1.5, 3.0, 10.0]).reshape(1, 1, 1, -1)
    assert torch.equal(noise_as_image(x_T, T).flatten(), torch.tensor([-1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.0]))


def test_a_picture_is_saved_as_png_and_its_folder_made(tmp_path: Path):
    picture = grid([Row("a", images(1, 3, 8))])
    save(picture, tmp_path / "new" / "folder" / "picture")
    with Image.open(tmp_path / "new" / "folder" / "picture") as found:
        assert found.format == "PNG"
        assert np.array_equal(np.asarray(found), np.asarray(picture))


@pytest.mark.parametrize("path", ["file/picture.png", "."])
def test_a_place_that_cannot_be_written_is_named(tmp_path: Path, path: str):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(ConfigError, match=r"cannot write the picture .*: .* Choose another --out"):
        save(grid([Row("a", images(1, 1, 8))]), tmp_path / path)
