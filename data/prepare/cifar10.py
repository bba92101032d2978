"""CIFAR-10 from its official archive: the local file, its unpacked folder, or a URL."""

import hashlib
import io
import pickle
import tarfile
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Any

import numpy as np

from data import store
from data.errors import DataError
from data.prepare.layout import Stretch
from data.prepare.pack import Sample

FOLDER = "cifar-10-batches-py"
DOWNLOAD_URL = "https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz"

BATCHES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"train": tuple(f"data_batch_{number}" for number in range(1, 6)), "test": ("test_batch",)}
)
MD5: Mapping[str, str] = MappingProxyType(
    {
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
    }
)
"""MD5 of each official batch file."""

_LONGEST_BATCH = 40 * 2**20
IMAGES_IN_BATCH = 10_000


class _BatchUnpickler(pickle.Unpickler):
    """Rebuilds the arrays of a batch file; any other name in the pickle is refused, so nothing in it can run."""

    _ALLOWED: Mapping[tuple[str, str], Any] = MappingProxyType(
        {
            ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
            ("numpy", "ndarray"): np.ndarray,
            ("numpy", "dtype"): np.dtype,
        }
    )

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        """The admitted numpy constructors."""
        if (module_name, global_name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module_name}.{global_name} is not part of a CIFAR-10 batch")
        return self._ALLOWED[module_name, global_name]


def _verified(payload: bytes, name: str, where: str) -> bytes:
    digest = hashlib.md5(payload, usedforsecurity=False).hexdigest()
    if digest != MD5[name]:
        raise DataError(
            f"{where}: {name} ({len(payload)} bytes) has the MD5 {digest}, but the official file has {MD5[name]}. "
            f"Download the archive again from {DOWNLOAD_URL}"
        )
    return payload


def _parsed(payload: bytes, where: str) -> tuple[np.ndarray, list[int]]:
    """Images of shape (10000, 32, 32, 3) and labels of a batch whose MD5 was checked."""
    try:
        batch = _BatchUnpickler(io.BytesIO(payload), encoding="bytes").load()
        images = np.asarray(batch[b"data"], dtype=np.uint8).reshape(IMAGES_IN_BATCH, 3, 32, 32)
        labels = [int(label) for label in batch[b"labels"]]
    except (pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError, EOFError) as error:
        raise DataError(
            f"{where} is not a CIFAR-10 batch ({error}): download the archive again from {DOWNLOAD_URL}"
        ) from error
    return images.transpose(0, 2, 3, 1), labels


def _read(path: Path) -> tuple[np.ndarray, list[int]]:
    """Images and labels of a batch file, whose name says which MD5 it must have."""
    try:
        payload = path.read_bytes()
    except OSError as error:
        raise DataError(
            f"cannot read {path} ({error.strerror}): give the CIFAR-10 archive or its unpacked folder {FOLDER}"
        ) from error
    return _parsed(_verified(payload, path.name, str(path)), str(path))


def entries(path: Path, batch: tuple[str, str], start: int, stop: int) -> Iterator[Sample]:
    """Images of a batch file, known by its name and MD5, from `start` to `stop`."""
    name, _ = batch
    images, labels = _read(path)
    for index in range(start, stop):
        yield Sample(key=f"{name}-{index:05d}", image=images[index], label=labels[index])


def labels(folder: Path) -> dict[str, tuple[int, ...]]:
    """Images of each class, for each split."""
    return {
        split: tuple(np.bincount([label for name in names for label in _read(folder / name)[1]]).tolist())
        for split, names in BATCHES.items()
    }


def stretches(folder: Path) -> dict[str, list[Stretch]]:
    """The batch files of each split: 50,000 RGB images of 32x32 for "train", 10,000 for "test", in official order."""
    return {
        split: [
            Stretch(
                kind="cifar10", images=(name, MD5[name]), count=IMAGES_IN_BATCH, read=partial(entries, folder / name)
            )
            for name in names
        ]
        for split, names in BATCHES.items()
    }


@contextmanager
def unpacked(source: str) -> Iterator[Path]:
    """A folder with the six batch files of `source`: a given folder itself, or a temporary one for an archive.

    Of a tar file, of any compression, the batch files are unpacked and nothing else.
    """
    local = Path(store.absolute(source)) if store.is_local(source) else None
    if local is not None and local.is_dir():
        yield local / FOLDER if (local / FOLDER).is_dir() else local
        return
    with tempfile.TemporaryDirectory(prefix="bcm-cifar10-") as temporary:
        folder = Path(temporary)
        if local is None:
            local = folder / "archive"
            store.fetch(source, None, None, local)
        wanted = {f"{FOLDER}/{name}": name for name in MD5}
        try:
            with tarfile.open(local, mode="r|*") as tar:
                for member in tar:
                    name = wanted.pop(str(PurePosixPath(member.name)), None)
                    content = tar.extractfile(member) if name is not None and member.size <= _LONGEST_BATCH else None
                    if name is not None and content is not None:
                        (folder / name).write_bytes(_verified(content.read(), name, source))
        except (OSError, tarfile.TarError, EOFError, ValueError) as error:
            raise DataError(
                f"cannot read the CIFAR-10 archive {source} ({type(error).__name__}: {error}). Give a whole "
                f"cifar-10-python.tar.gz, for example from {DOWNLOAD_URL}"
            ) from error
        missing = [name for name in MD5 if not (folder / name).exists()]
        if missing:
            raise DataError(f"{source} lacks {', '.join(missing)}: download the archive again from {DOWNLOAD_URL}")
        yield folder
