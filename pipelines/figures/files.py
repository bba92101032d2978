"""Images as files: a PNG file for each, or an array of all as the field's evaluators read it."""

import io
import re
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image

from bcm.types import to_uint8
from data import store
from pipelines.figures.grid import Row


def write_files(batches: Iterable[tuple[range, Sequence[Row]]], folder: str) -> None:
    """A file SEED.png for each image of batches of rows, in `folder`; of several rows, in a folder below for each."""
    for seeds, rows in batches:
        for row in rows:
            place = store.join(folder, _name(row)) if len(rows) > 1 else folder
            for seed, pixels in zip(seeds, _pixels(row), strict=True):
                buffer = io.BytesIO()
                Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, format="png")
                store.write_bytes(store.join(place, f"{seed:06d}.png"), buffer.getvalue())


def write_arrays(batches: Iterable[tuple[range, Sequence[Row]]], out: str) -> None:
    """An npz file of all images of batches of rows; of several rows, one for each, in a folder.

    arr_0 holds the images as uint8 of shape (B, H, W, 3), arr_1 the labels (B,) where there are any. That is what ADM's
    evaluator and those after it read; grey images have three equal channels there.
    """
    parts: dict[str, list[np.ndarray]] = {}
    labels: dict[str, list[int]] = {}
    for _, rows in batches:
        for row in rows:
            place = store.join(out.removesuffix(".npz"), f"{_name(row)}.npz") if len(rows) > 1 else out
            parts.setdefault(place, []).append(np.broadcast_to(pixels := _pixels(row), (*pixels.shape[:3], 3)))
            labels.setdefault(place, []).extend(row.labels or ())
    for place, arrays in parts.items():
        buffer = io.BytesIO()
        np.savez(buffer, np.concatenate(arrays), *([np.asarray(labels[place], np.int64)] if labels[place] else []))
        store.write_bytes(place, buffer.getvalue())


def _name(row: Row) -> str:
    return re.sub(r"\W+", "-", row.caption.lower())


def _pixels(row: Row) -> np.ndarray:
    """(B, H, W, C) uint8."""
    return to_uint8(row.images).permute(0, 2, 3, 1).cpu().numpy()
