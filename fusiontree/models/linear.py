"""The one linear layer of the models: torch's, without bias, through `ops.linear`."""

from __future__ import annotations

from torch import Tensor, nn

from fusiontree.ops import linear


class Linear(nn.Linear):
    """(…, in) → (…, out)."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)
