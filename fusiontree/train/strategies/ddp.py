"""DDP: every process has the whole model; gradients are averaged."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fusiontree.train.config import TrainingSection
from fusiontree.train.strategies.single import SingleProcess


class DataParallel(SingleProcess):
    """torch's DistributedDataParallel."""

    def _adopt(self, model: nn.Module, settings: TrainingSection) -> None:
        """Wrap the model; the weights become the first process's."""
        super()._adopt(model, settings)
        self.forward = DistributedDataParallel(
            model,
            gradient_as_bucket_view=True,
            # A branch that is left out has no gradients in that step; looking for such weights costs a little.
            find_unused_parameters=self.model.config.drop_branch_prob > 0,
        )

    def accumulating(self, last: bool) -> AbstractContextManager[Any]:
        """Gradients stay here until the last micro-batch."""
        return nullcontext() if last else self.forward.no_sync()

    def backward(self, loss: Tensor, scale: float) -> None:
        """Shares of the loss add up, where DDP would average."""
        super().backward(loss, scale * self.ranks.world_size)
