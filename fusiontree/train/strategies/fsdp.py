"""FSDP2: weights, gradients and optimizer state are divided among the processes, block by block."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from fusiontree.train.config import TrainingSection
from fusiontree.train.optim import build_optimizers
from fusiontree.train.ranks import Ranks
from fusiontree.train.strategies.single import SingleProcess


class FullyShardedDataParallel(SingleProcess):
    """torch's fully_shard; each block's weights are whole only while it works, gradients only until they are summed.

    `offload`: the parts rest in the host's memory, where the update is made.
    """

    def __init__(self, ranks: Ranks, offload: bool) -> None:
        super().__init__(ranks)
        self.mesh = init_device_mesh(ranks.device.type, (ranks.world_size,))
        self.policy = CPUOffloadPolicy(pin_memory=ranks.device.type == "cuda") if offload else OffloadPolicy()

    def _adopt(self, model: nn.Module, settings: TrainingSection) -> None:
        """Divide the model, then build optimizers over the parts."""
        self.model = self.forward = self._divide(model)
        self.optimizers = build_optimizers(model, settings)

    def host(self, model: nn.Module) -> Any:
        """A teacher is divided too."""
        return self._divide(model.requires_grad_(False)).eval()

    def _divide(self, model: Any) -> Any:
        """A part of every weight on the device; the marks of the optimizer move to the new parameters."""
        undecayed = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
        for block in model.model.layers:
            fully_shard(block, mesh=self.mesh, offload_policy=self.policy)
        fully_shard(model, mesh=self.mesh, offload_policy=self.policy)
        for name, parameter in model.named_parameters():
            if name in undecayed:
                parameter._no_weight_decay = True
        return model

    def backward(self, loss: Tensor, scale: float) -> None:
        """Shares of the loss add up, where FSDP would average."""
        super().backward(loss, scale * self.ranks.world_size)

    def _clip(self, max_norm: float) -> Tensor:
        norm = super()._clip(max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def load_optimizer_state(self, names: list[str], read: Callable[[str], Tensor]) -> None:
        """Each process keeps its part of what it reads."""
        parameters = dict(self.model.named_parameters())
        self.optimizers.load_state_tensors(
            {name: self._own_part(parameters[name.rpartition("/")[0]], read(name)) for name in names}
        )

    def _own_part(self, parameter: Tensor, state: Tensor) -> Tensor:
        if not isinstance(parameter, DTensor) or state.shape != parameter.shape:  # a step count has no parts
            return state
        return distribute_tensor(state.to(self.device), self.mesh, parameter.placements)

    def whole(self, tensor: Tensor) -> Tensor:
        """The parts of all processes, put together."""
        tensor = tensor.detach()
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
