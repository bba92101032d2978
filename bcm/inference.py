"""A trained model with its best time steps: generate, invert and reconstruct from integer seeds.

Row i depends on its own seed alone, not on the batch it is in.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from bcm import inversion, rng, samplers, strict
from bcm.checkpoint import load_model, save_model
from bcm.networks import NetworkConfig
from bcm.precond import BCM
from bcm.timesteps import Ancestral, Inversion, Multistep, TimeSteps
from bcm.types import BCMError, Images, Labels

SCHEDULES = "schedules.json"

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
    objective: str = ""
    """What the weights were trained for, a name in `bcm.objectives.OBJECTIVES`; "" where that is not known."""

    def __post_init__(self) -> None:
        """Check that the model gives equal images for equal calls, and can follow each schedule."""
        if any(module.training for module in self.model.modules()):
            raise BCMError(
                "the model is in training mode, where dropout makes two equal calls differ; give model.eval()."
            )
        check_schedules(self.schedules, self.network)

    @property
    def denoiser(self) -> bool:
        """Whether f gives the mean of all images that x_t may come from (objective `edm`), and so no sample."""
        return self.objective == "edm"


def check_schedules(schedules: Mapping[str, TimeSteps], network: NetworkConfig) -> None:
    """Raise `BCMError` unless each schedule does what its name says, and a model of that network can follow it."""
    for name, steps in schedules.items():
        task = "invert" if isinstance(steps, Inversion) else "sample"
        if name != f"{task}-{steps.nfe}":
            raise BCMError(f"schedule {name!r} holds {steps}, whose name is '{task}-{steps.nfe}'; rename it.")
        to_0_alone = isinstance(steps, Multistep) or (isinstance(steps, Ancestral) and steps.nfe == 1)
        if network.times == 1 and not to_0_alone:
            raise BCMError(
                f"schedule {name!r} holds {steps}, but a model of one time only maps to time 0: "
                "it follows multistep time steps, or one step."
            )


def save_toolkit(directory: Path, toolkit: Toolkit, attachments: Mapping[str, bytes] | None = None) -> None:
    """Write weights, architecture and schedules for inference alone: safetensors and JSON, and other files by name."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / SCHEDULES).write_text(json.dumps(dump_schedules(toolkit.schedules), indent=1))
    save_model(
        directory,
        toolkit.model,
        toolkit.network,
        k=toolkit.k,
        objective=toolkit.objective,
        attachments=attachments,
    )


def load_toolkit(directory: Path, device: torch.device | str = "cpu") -> Toolkit:
    """The inverse of `save_toolkit`; a missing, damaged or wrong file raises `BCMError`."""
    model, index = load_model(directory, device)
    path = directory / SCHEDULES
    try:
        text = path.read_bytes()
    except OSError as error:
        raise BCMError(f"the schedules in {path} cannot be read: {error}.") from error
    schedules = read_schedules(text, str(path))
    return Toolkit(model=model, network=index.network, k=index.k, schedules=schedules, objective=index.objective)


def read_schedules(text: str | bytes, where: str) -> dict[str, TimeSteps]:
    """The schedules in a JSON text that stands at `where`, by name; what is wrong with them is a `BCMError`."""
    return strict.read(dict[str, TimeSteps], text, where)


def dump_schedules(schedules: Mapping[str, TimeSteps]) -> dict[str, Any]:
    """The inverse of `read_schedules`, up to the text."""
    return strict.dump(dict(schedules), dict[str, TimeSteps])


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
            "Invert and reconstruct with a bidirectional model; pipelines.train --init makes one of it."
        )


def steps_for(toolkit: Toolkit, task: Task, nfe: int = 0) -> TimeSteps:
    """The time steps of `task` with `nfe` network calls, 0 for the most; what the model cannot do is refused."""
    check_task(toolkit, task)
    known = sorted((steps.nfe, name) for name, steps in toolkit.schedules.items() if name.startswith(f"{task}-"))
    name = known[-1][1] if nfe == 0 and known else f"{task}-{nfe}"
    if name not in toolkit.schedules:
        there = ", ".join(name for _, name in known) or "none"
        raise BCMError(f"this model has no time steps {name!r}; it has {there}. Choose one of these NFE, or 0.")
    return toolkit.schedules[name]


def generate(toolkit: Toolkit, seeds: Sequence[int], nfe: int = 0, labels: Sequence[int] | None = None) -> Images:
    """New images (B, C, H, W), about [-1, 1], one for each seed in [0, 2^48), with `nfe` network calls."""
    ids, label = _rows(toolkit, seeds, labels)
    steps = steps_for(toolkit, "sample", nfe)
    z = _noise(toolkit, ids, rng.Stream.SAMPLE)
    renoise = partial(_noise, toolkit, ids, rng.Stream.RENOISE)
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
    device, classes = next(toolkit.model.parameters()).device, toolkit.network.classes
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
