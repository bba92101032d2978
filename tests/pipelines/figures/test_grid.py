"""Pictures show each image's own pixels in its place."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from bcm.types import to_uint8
from data.errors import DataError
from pipelines.errors import ConfigError
from pipelines.figures.grid import CAPTION_WIDTH, GAP, Row, columns_for, grid, noise_as_image, save


def images(count: int, channels: int, side: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(seed)) * 2.4 - 1.2


@pytest.mark.parametrize(
    ("channels", "side", "size"), [(1, 8, 128), (3, 8, 128), (3, 32, 128), (1, 20, 120), (3, 64, 128), (3, 256, 256)]
)
def test_each_image_stands_enlarged_in_its_place(channels: int, side: int, size: int):
    rows = [Row("one", images(3, channels, side, seed=1)), Row("two\nlines", images(2, channels, side, seed=2))]
    picture = grid(rows)
    assert picture.size == (CAPTION_WIDTH + 3 * (size + GAP) + GAP, 2 * (size + GAP) + GAP)
    for i, row in enumerate(rows):
        for j, image in enumerate(row.images):
            assert np.array_equal(tile_at(picture, i, j, size), enlarged(image, size))


def tile_at(picture: Image.Image, line: int, column: int, size: int) -> np.ndarray:
    top, left = GAP + line * (size + GAP), CAPTION_WIDTH + GAP + column * (size + GAP)
    return np.asarray(picture)[top : top + size, left : left + size]


def enlarged(image: torch.Tensor, size: int) -> np.ndarray:
    times = size // image.shape[-1]
    pixels = to_uint8(image).numpy().repeat(times, axis=1).repeat(times, axis=2).transpose(1, 2, 0)
    return np.broadcast_to(pixels, (size, size, 3))


@pytest.mark.parametrize(
    ("rows", "count", "columns"),
    [(1, 1, 1), (1, 9, 3), (1, 10, 4), (1, 16, 4), (1, 5000, 71), (3, 12, 6), (3, 16, 8), (7, 12, 12), (7, 3, 3)],
)
def test_a_grid_is_near_square(rows: int, count: int, columns: int):
    assert columns_for(rows, count) == columns


def test_long_rows_are_broken_and_no_image_is_lost():
    many = images(40, 1, 8)
    picture = grid([Row("samples", many)])
    columns = columns_for(1, 40)
    for index, image in enumerate(many):
        assert np.array_equal(tile_at(picture, index // columns, index % columns, 128), enlarged(image, 128))
    above, below = images(16, 1, 8, seed=1), images(16, 1, 8, seed=2)
    both = grid([Row("a", above), Row("b", below)])
    columns = columns_for(2, 16)
    for index in range(16):
        line = 2 * (index // columns)
        assert np.array_equal(tile_at(both, line, index % columns, 128), enlarged(above[index], 128))
        assert np.array_equal(tile_at(both, line + 1, index % columns, 128), enlarged(below[index], 128))


def test_a_picture_too_large_to_open_is_refused():
    with pytest.raises(ConfigError, match=r"900 images make a picture of .* pixels. Write files: --format png or npz"):
        grid([Row("", torch.zeros(900, 1, 512, 512).expand(900, 1, 512, 512))])


def test_what_no_image_covers_is_white_but_for_the_captions():
    pixels = np.asarray(grid([Row("name", images(2, 1, 8)), Row("", images(1, 1, 8))]))
    assert (pixels[:GAP] == 255).all() and (pixels[-GAP:] == 255).all()
    assert (pixels[GAP : GAP + 128, :CAPTION_WIDTH] < 128).any()
    assert (pixels[2 * GAP + 128 : -GAP, :CAPTION_WIDTH] == 255).all()
    assert (pixels[2 * GAP + 128 : -GAP, CAPTION_WIDTH + 2 * GAP + 128 :] == 255).all()


def test_noise_is_shown_in_units_of_its_own_scale():
    T = 80.0
    x_T = T * torch.tensor([-10.0, -3.0, -1.5, 0.0, 1.5, 3.0, 10.0]).reshape(1, 1, 1, -1)
    assert torch.equal(noise_as_image(x_T, T).flatten(), torch.tensor([-1.0, -1.0, -0.5, 0.0, 0.5, 1.0, 1.0]))


@pytest.mark.parametrize(
    ("name", "format"), [("a.png", "PNG"), ("b.jpg", "JPEG"), ("c.JPEG", "JPEG"), ("d.webp", "WEBP")]
)
def test_a_picture_is_what_its_name_says_and_its_folder_made(tmp_path: Path, name: str, format: str):
    picture = grid([Row("a", images(1, 3, 8))])
    save(picture, str(tmp_path / "new" / "folder" / name))
    with Image.open(tmp_path / "new" / "folder" / name) as found:
        assert (found.format, found.size) == (format, picture.size)
        assert format != "PNG" or np.array_equal(np.asarray(found), np.asarray(picture))


@pytest.mark.parametrize("name", ["picture", "picture.tiff", "png", "x.npz"])
def test_a_name_that_says_no_kind_of_picture_is_refused(tmp_path: Path, name: str):
    with pytest.raises(ConfigError, match=r"the name of a picture ends in \.png, \.jpg"):
        save(grid([Row("a", images(1, 1, 8))]), str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(DataError, match=r"cannot write .*file/picture.png: .*choose another path"):
        save(grid([Row("a", images(1, 1, 8))]), str(tmp_path / "file" / "picture.png"))
