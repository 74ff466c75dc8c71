"""One process, one device: the engine that the others extend."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.train.config import TrainingSection
from fusiontree.train.optim import Optimizers, build_optimizers
from fusiontree.train.ranks import Ranks


class SingleProcess:
    """What differs between one process and many; the loop, the checkpoint layout and the callbacks do not.

    Weights are in the model before `adopt`; the optimizer's state comes after it.
    """

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.device = ranks, ranks.device
        self.model: Any = None
        self.forward: Any = None
        """Called in place of the model in training steps."""
        self.optimizers: Optimizers
        self.parameters = 0
        """Of the whole model."""

    def adopt(self, model: nn.Module, settings: TrainingSection) -> None:
        """Take the model over: to the device, divided or wrapped as the engine needs, with its optimizers."""
        self.parameters = sum(parameter.numel() for parameter in model.parameters())
        self._adopt(model, settings)

    def _adopt(self, model: nn.Module, settings: TrainingSection) -> None:
        self.model = self.forward = model.to(self.device)
        self.optimizers = build_optimizers(model, settings)

    def host(self, model: nn.Module) -> Any:
        """Make a model that is only asked, such as a teacher, ready on the device."""
        return model.to(self.device).eval().requires_grad_(False)

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Around forward and backward of a micro-batch; gradients are exchanged with the `last` of a step."""
        return nullcontext()

    def backward(self, loss: Tensor, scale: float) -> None:
        """Add the gradients of this process's share of the step's loss, times `scale`; all shares add up."""
        (loss * scale).backward()

    def update(self, max_norm: float, scale: float) -> tuple[float, bool]:
        """Scale gradients down to a global L2 norm and update the weights, unless the norm is not finite.

        `scale`: what the loss was multiplied by. Gives the norm before, and whether the weights were updated; the
        gradients are gone in either case, and all processes agree.
        """
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        if scale != 1.0:
            torch._foreach_mul_(gradients, 1.0 / scale)
        norm = float(self._clip(max_norm))  # waits for the device
        finite = math.isfinite(norm)
        if finite:
            self.optimizers.step()
        self.optimizers.zero_grad()
        return norm, finite

    def _clip(self, max_norm: float) -> Tensor:
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), max_norm)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and whole value of each weight, one after the other; every process must go through all."""
        for name, parameter in self.model.named_parameters():
            yield name, self.whole(parameter)

    def optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        """`parameter name/state name` and whole value, one after the other; every process must go through all."""
        for name, tensor in self.optimizers.state_tensors().items():
            yield name, self.whole(tensor)

    def load_optimizer_state(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        """Take over what `optimizer_state` gave; every process must read the names in order."""
        self.optimizers.load_state_tensors({name: read(name) for name in names})

    def whole(self, tensor: Tensor) -> Tensor:
        """A weight or state with all its parts."""
        return tensor.detach()
