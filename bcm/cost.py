"""What a training step costs, in floating-point operations and bytes, counted without doing it."""

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from bcm.networks import NetworkConfig, build_network
from bcm.precond import BCM
from bcm.schedule import ScheduleConfig
from bcm.training import TrainConfig, TrainState, train_step
from bcm.types import at_time

aten = torch.ops.aten
FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[aten._scaled_dot_product_flash_attention],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}
"""FLOPs of each operation, two for a multiplication and addition: those of torch.utils.flop_counter, which lacks
attention on the CPU."""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one optimizer step costs; memory is in bytes on one worker."""

    parameters: int
    """Trainable numbers of the network."""
    forward_flops: int
    """FLOPs of one forward pass over the batch of all workers."""
    step_flops: int
    """FLOPs of the whole step of all workers, what checkpointing computes again included."""
    weights: int
    """Weights and buffers of the model."""
    gradients: int
    """Gradients, once the backward pass has made them all."""
    moments: int
    """The optimizer's moments."""
    averages: int
    """The averages of the weights."""
    peak: int
    """All tensors at the fullest moment of the step: mostly what the forward pass keeps for the backward pass."""


@cache
def step_cost(network: NetworkConfig, train: TrainConfig, schedule: ScheduleConfig, workers: int = 1) -> Cost:
    """Count one optimizer step as `bcm.training.train_step` makes it, on tensors without values.

    The peak is that of all tensors that live on the device of one worker during the step: weights, gradients (the
    buckets of data-parallel training, which stay, when there are several workers), moments, averages, the batch, what
    the forward pass keeps for the backward pass, and every temporary result. Not counted are the scratch space inside
    an operation (such as cuDNN's), what the allocator wastes, and the rest of the process: Python, Ray, libraries and
    the cache of the data. Operations are those of the CPU; on a GPU autocast to bf16 keeps more results in fp32.

    Args:
        network: shape of F_theta.
        train: batch, objective, precision, averages, accumulation and checkpointing decide the cost; one micro-batch
            stands for all.
        schedule: the law of the times.
        workers: processes that share the batch.
    """
    share = train.batch_size // workers // train.accumulate
    once = replace(train, accumulate=1, compile=False, channels_last=False)
    with warnings.catch_warnings(), _Ledger() as ledger:
        warnings.filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # copying a model does that
        model = BCM(build_network(network))
        state = TrainState(model, once, conditional=network.classes > 0)
        _add_what_is_there_before(state, gradients=workers > 1 or train.accumulate > 1)
        train_step(state, _batch(network, share), once, schedule)
        step_flops, peak = ledger.flops, ledger.peak
        batch = _batch(network, 1)
        x = batch.images.float()
        with torch.no_grad():
            model(x, at_time(1.0, x), at_time(1.0, x), batch.labels if state.conditional else None)
        return Cost(
            parameters=sum(p.numel() for p in model.parameters() if p.requires_grad),
            forward_flops=(ledger.flops - step_flops) * train.batch_size,
            step_flops=step_flops * train.batch_size // share,
            weights=_bytes(chain(model.parameters(), model.buffers())),
            gradients=_bytes(model.parameters()),
            moments=_bytes(tree_leaves(state.optimizer.state_dict()["state"])),
            averages=sum(_bytes(chain(p.parameters(), p.buffers())) for p in state.averages.values()),
            peak=peak,
        )


class _Ledger(FakeTensorMode):
    """Tensors made under it have no values; their bytes and the operations on them are added up."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.alive = self.peak = 0
        self._inside = False
        self._storages: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Ledger":
        """Copies of its tensors belong to it too."""
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is aten._local_scalar_dense.default:  # a value is asked for: one that passes every check of a step
            return 1.0 if args[0].is_floating_point() else 0
        if func is aten.is_set_to.default:  # which these tensors cannot tell
            return True
        if func is torch.ops.prim.device.default:  # asked so often that the long way takes a second
            return args[0].fake_device
        if func.__name__.startswith("_foreach_") and func._schema.is_mutable:  # makes no tensor, and takes as long
            return None
        if self._inside:  # what an operation is made of, seen only when torch does not know its result by heart
            return super().__torch_dispatch__(func, types, args, kwargs or {})
        self._inside = True
        try:
            out = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self._inside = False
        if formula := FORMULAS.get(func._overloadpacket):
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._enter(tensor.untyped_storage())
        self.peak = max(self.peak, self.alive)
        return out

    def _enter(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._storages:
            self._storages.add(storage)
            self.alive += storage.nbytes()
            weakref.finalize(storage, self._leave, storage.nbytes())

    def _leave(self, size: int) -> None:
        self.alive -= size


def _add_what_is_there_before(state: TrainState, gradients: bool) -> None:
    """Make room for the optimizer's moments, until it makes them, and for gradients if they are there already."""
    parameters = list(state.model.parameters())
    moments = [torch.zeros(2, sum(p.numel() for p in parameters), dtype=parameters[0].dtype)]

    def let_go(*_: Any) -> None:
        moments.clear()

    state.optimizer.register_step_pre_hook(let_go)
    if gradients:
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)


@dataclass(frozen=True)
class _Batch:
    """A `TrainingBatch`."""

    positions: Tensor
    images: Tensor
    labels: Tensor


def _batch(network: NetworkConfig, size: int) -> _Batch:
    index = torch.zeros(size, dtype=torch.int64)
    shape = (size, network.image_channels, network.resolution, network.resolution)
    return _Batch(index, torch.zeros(shape, dtype=torch.uint8), index.clone())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
