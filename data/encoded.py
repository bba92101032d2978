"""Images that stay encoded and are decoded when they are asked for."""

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from data.decode import decode_images
from data.manifest import Manifest

_IMAGES_A_TASK = 32


@dataclass(frozen=True, kw_only=True, eq=False)
class EncodedImages:
    """What an array of shape (n, C, H, W) gives when it is indexed along its first axis.

    Attributes:
        raw: Bytes of whole tar files, one after another.
        offsets: First byte of each image, int64 of shape (n,).
        sizes: Bytes of each image.
        manifest: Of the set, for the size and channels that every image must have.
        url: Of the set, for messages.
    """

    raw: NDArray[np.uint8]
    offsets: NDArray[np.int64]
    sizes: NDArray[np.int64]
    manifest: Manifest
    url: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.offsets)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the array of all images."""
        return len(self), self.manifest.channels, self.manifest.resolution, self.manifest.resolution

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        # Threads and no processes: decoders run without the interpreter's lock, and nothing is forked.
        return ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1), thread_name_prefix="bcm-decode")

    def __getitem__(self, rows: int | slice | NDArray[np.int64]) -> NDArray[np.uint8]:
        """The images at these rows, decoded now."""
        chosen = np.atleast_1d(np.arange(len(self))[rows])
        tasks = [chosen[start : start + _IMAGES_A_TASK] for start in range(0, len(chosen), _IMAGES_A_TASK)]
        images = np.empty((len(chosen), *self.shape[1:]), np.uint8)
        for index, block in enumerate(self._pool.map(self._decoded, tasks)):
            images[index * _IMAGES_A_TASK : index * _IMAGES_A_TASK + len(block)] = block
        return images[0] if isinstance(rows, int) else images

    def _decoded(self, rows: NDArray[np.int64]) -> NDArray[np.uint8]:
        return decode_images(self.raw, self.offsets[rows], self.sizes[rows], self.manifest, self.url)
