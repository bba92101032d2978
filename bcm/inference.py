"""A trained model with its best time steps: generate, invert and reconstruct from integer seeds.

Row i depends on its own seed alone, not on the batch it is in.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor

from bcm import inversion, rng, samplers
from bcm.checkpoint import CheckpointInfo, load_model, save_model
from bcm.networks import ADMConfig, NetworkConfig
from bcm.precond import BCM
from bcm.timesteps import (
    CONSISTENCY_CIFAR10,
    CONSISTENCY_IMAGENET64,
    PAPER_CIFAR10,
    PAPER_CIFAR10_DEEP,
    PAPER_IMAGENET64,
    Ancestral,
    Inversion,
    Multistep,
    TimeSteps,
    from_dict,
    to_dict,
)
from bcm.types import BCMError, Images, Labels

SCHEDULES = "schedules.json"

DEEP = 8
"""Residual blocks a level of the deep NCSN++, which has time steps of its own."""

Task = Literal["sample", "invert"]


@dataclass(frozen=True, kw_only=True)
class Toolkit:
    """What inference needs."""

    model: BCM
    """The flow, in eval mode, on the device to be used."""
    network: NetworkConfig
    """The shape of its network."""
    k: int
    """Training iterations behind the weights."""
    schedules: Mapping[str, TimeSteps]
    """Time steps by task and NFE, such as `sample-1` or `invert-4`."""
    denoiser: bool = False
    """Whether f gives the mean of all images that x_t may come from (objective `edm`), and so no sample."""

    def __post_init__(self) -> None:
        """Check that each schedule does what its name says, and that the model can follow it."""
        for name, steps in self.schedules.items():
            task = "invert" if isinstance(steps, Inversion) else "sample"
            if name != f"{task}-{steps.nfe}":
                raise BCMError(f"schedule {name!r} holds {steps}, whose name is '{task}-{steps.nfe}'; rename it.")
            if self.network.times == 1 and not _to_0_alone(steps):
                raise BCMError(
                    f"schedule {name!r} holds {steps}, but a model of one time only maps to time 0: "
                    "it follows multistep time steps, or one step."
                )

    @staticmethod
    def of(model: BCM, info: CheckpointInfo, schedules: Mapping[str, TimeSteps]) -> "Toolkit":
        """A model as `load_model` gives it, with these time steps."""
        return Toolkit(
            model=model, network=info.network, k=info.k, schedules=schedules, denoiser=objective_of(info) == "edm"
        )


def _to_0_alone(steps: TimeSteps) -> bool:
    return isinstance(steps, Multistep) or (isinstance(steps, Ancestral) and steps.nfe == 1)


def objective_of(info: CheckpointInfo) -> str:
    """What the weights were trained for, noted in the checkpoint by training or import; "" where it is not."""
    config = info.extra.get("config", {})
    return str(info.extra.get("objective") or config.get("train", {}).get("objective", ""))


def paper_schedules(network: NetworkConfig) -> Mapping[str, TimeSteps]:
    """The published time steps of the model nearest to `network`: ImageNet-64's for ADM, else CIFAR-10's."""
    adm = isinstance(network, ADMConfig)
    if network.times == 1:
        return CONSISTENCY_IMAGENET64 if adm else CONSISTENCY_CIFAR10
    if adm:
        return PAPER_IMAGENET64
    return PAPER_CIFAR10_DEEP if network.blocks >= DEEP else PAPER_CIFAR10


def save_toolkit(directory: Path, toolkit: Toolkit, extra: Mapping[str, Any] | None = None) -> None:
    """Write weights, architecture and schedules for inference alone: safetensors and JSON."""
    directory.mkdir(parents=True, exist_ok=True)
    entries = {name: to_dict(steps) for name, steps in toolkit.schedules.items()}
    (directory / SCHEDULES).write_text(json.dumps(entries, indent=1))
    save_model(directory, toolkit.model, toolkit.network, toolkit.k, extra or {})


def load_toolkit(directory: Path, device: torch.device | str = "cpu") -> Toolkit:
    """The inverse of `save_toolkit`; a missing, damaged or wrong file raises `BCMError`."""
    model, info = load_model(directory, device)
    return Toolkit.of(model, info, read_schedules(directory / SCHEDULES))


def read_schedules(path: Path) -> dict[str, TimeSteps]:
    """The schedules in a JSON file, by name."""
    try:
        entries = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise BCMError(f"the schedules in {path} cannot be read: {error}.") from error
    if not isinstance(entries, dict) or not all(isinstance(v, dict) for v in cast(dict[str, Any], entries).values()):
        raise BCMError(f"{path} does not hold schedules by name.")
    return {name: from_dict(entry) for name, entry in cast(dict[str, dict[str, Any]], entries).items()}


def choose(schedules: Mapping[str, TimeSteps], task: Task, nfe: int = 0) -> TimeSteps:
    """The schedule of `task` with `nfe` network calls; 0 takes the one with the most."""
    known = sorted((steps.nfe, name) for name, steps in schedules.items() if name.startswith(f"{task}-"))
    name = known[-1][1] if nfe == 0 and known else f"{task}-{nfe}"
    if name not in schedules:
        there = ", ".join(name for _, name in known) or "none"
        raise BCMError(f"this model has no time steps {name!r}; it has {there}. Choose one of these NFE, or 0.")
    return schedules[name]


def check_task(toolkit: Toolkit, task: Task) -> None:
    """Refuse with a `BCMError` what no time steps can make of this model."""
    if toolkit.denoiser:
        raise BCMError(
            "this model is a denoiser (objective edm): one call gives the mean of the possible images, which is no "
            "sample, and it has no inverse direction here. Train or import a consistency model."
        )
    if task == "invert" and toolkit.network.times == 1:
        raise BCMError(
            "this model has no inverse direction: it reads one time and only maps noise to images. "
            "Invert and reconstruct with a bidirectional model; pipelines.finetune makes one of it."
        )


def steps_for(toolkit: Toolkit, task: Task, nfe: int = 0) -> TimeSteps:
    """The time steps of `task` with `nfe` network calls, 0 for the most; what the model cannot do is refused."""
    check_task(toolkit, task)
    return choose(toolkit.schedules, task, nfe)


def generate(toolkit: Toolkit, seeds: Sequence[int], nfe: int = 0, labels: Sequence[int] | None = None) -> Images:
    """New images (B, C, H, W), about [-1, 1], one for each seed in [0, 2^48), with `nfe` network calls."""
    ids, label = _rows(toolkit, seeds, labels)

    def renoise(n: int) -> Tensor:
        return _noise(toolkit, ids, rng.Stream.RENOISE, n)

    steps = steps_for(toolkit, "sample", nfe)
    z = _noise(toolkit, ids, rng.Stream.SAMPLE)
    return samplers.sample(toolkit.model, z, steps, renoise, label)


def invert(
    toolkit: Toolkit, x: Images, seeds: Sequence[int], nfe: int = 0, labels: Sequence[int] | None = None
) -> Images:
    """The noise (B, C, H, W), of standard deviation about T, behind the images `x` (B, C, H, W) in [-1, 1]."""
    sigma, steps, label = _inversion(toolkit, x, seeds, nfe, labels)
    return inversion.invert(toolkit.model, x, steps, sigma, label)


def reconstruct(
    toolkit: Toolkit, x: Images, seeds: Sequence[int], nfe: int = 0, labels: Sequence[int] | None = None
) -> Images:
    """Invert the images `x` (B, C, H, W) with `nfe` network calls and regenerate them with one more."""
    sigma, steps, label = _inversion(toolkit, x, seeds, nfe, labels)
    return inversion.reconstruct(toolkit.model, x, steps, sigma, label)


def _inversion(
    toolkit: Toolkit, x: Images, seeds: Sequence[int], nfe: int, labels: Sequence[int] | None
) -> tuple[Tensor, Inversion, Labels | None]:
    steps = steps_for(toolkit, "invert", nfe)
    ids, label = _rows(toolkit, seeds, labels)
    wanted = (len(seeds), *_shape(toolkit))
    if tuple(x.shape) != wanted:
        raise BCMError(f"images of shape {tuple(x.shape)} are given; {len(seeds)} seeds need {wanted}.")
    assert isinstance(steps, Inversion)
    return _noise(toolkit, ids, rng.Stream.INVERSION), steps, label


def _rows(toolkit: Toolkit, seeds: Sequence[int], labels: Sequence[int] | None) -> tuple[Tensor, Labels | None]:
    """Seeds and labels, checked, on the device of the model."""
    device, classes = _device(toolkit), toolkit.network.classes
    if not all(0 <= seed < 2**48 for seed in seeds):
        raise BCMError(f"seeds {min(seeds)} ... {max(seeds)} leave the range [0, 2^48).")
    ids = torch.tensor(list(seeds), dtype=torch.int64, device=device)
    if classes == 0:
        if labels is not None:
            raise BCMError("this model knows no labels; leave them out.")
        return ids, None
    if labels is None or len(labels) != len(seeds) or not all(0 <= label < classes for label in labels):
        raise BCMError(f"this model needs one label in [0, {classes}) for each of the {len(seeds)} seeds.")
    return ids, torch.tensor(list(labels), dtype=torch.int64, device=device)


def _noise(toolkit: Toolkit, ids: Tensor, stream: rng.Stream, step: int = 0) -> Tensor:
    return rng.normal(0, stream, step, ids, _shape(toolkit))


def _shape(toolkit: Toolkit) -> tuple[int, int, int]:
    network = toolkit.network
    return network.image_channels, network.resolution, network.resolution


def _device(toolkit: Toolkit) -> torch.device:
    return next(toolkit.model.parameters()).device
