"""How one step is carried out: the interface that engines implement, and the single-process engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file, load_model, save_file
from torch import Tensor, nn
from transformers.utils.logging import disable_progress_bar, enable_progress_bar, is_progress_bar_enabled

from fusiontree.train.optim import Optimizers

OPTIMIZER_FILE = "trainer/optimizer.safetensors"


class Strategy(Protocol):
    """What differs between one process and many; the loop, the checkpoint layout and the callbacks do not."""

    device: torch.device
    rank: int
    world_size: int

    def wrap(self, model: nn.Module) -> nn.Module:
        """Put the model on the device and make it ready for many ranks."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar."""

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale gradients down to a global L2 norm; gives the norm before, without waiting for the device."""

    def step(self, optimizers: Optimizers) -> None:
        """Update the weights and drop the gradients."""

    def gather(self, tensor: Tensor) -> Tensor:
        """Sum over all ranks."""

    def save(self, folder: Path, model: Any, optimizers: Optimizers) -> None:
        """Write the model as a from_pretrained folder, and the optimizer's state beside it."""

    def load(self, folder: Path, model: Any, optimizers: Optimizers) -> None:
        """Take over what `save` wrote."""


class SingleProcess:
    """One process, one device."""

    rank = 0
    world_size = 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move the model."""
        return model.to(self.device)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of a scalar."""
        loss.backward()

    def clip(self, model: nn.Module, max_norm: float) -> Tensor:
        """Scale gradients down to a global L2 norm."""
        return torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)

    def step(self, optimizers: Optimizers) -> None:
        """Update the weights and drop the gradients."""
        optimizers.step()
        optimizers.zero_grad()

    def gather(self, tensor: Tensor) -> Tensor:
        """Nothing to add: there is one rank."""
        return tensor

    def save(self, folder: Path, model: Any, optimizers: Optimizers) -> None:
        """Write model.safetensors, config.json and the optimizer's state."""
        shown = is_progress_bar_enabled()
        disable_progress_bar()  # transformers would draw its own bar through ours
        model.save_pretrained(folder)
        if shown:
            enable_progress_bar()
        tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in optimizers.state_tensors().items()}
        save_file(tensors, folder / OPTIMIZER_FILE)

    def load(self, folder: Path, model: Any, optimizers: Optimizers) -> None:
        """Read back weights (tied ones once) and the optimizer's state."""
        load_model(model, folder / "model.safetensors", device=str(self.device))
        optimizers.load_state_tensors(load_file(folder / OPTIMIZER_FILE))
