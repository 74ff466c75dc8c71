"""The one linear layer of the models: torch's, mostly without bias, through `ops.linear`; and the output head."""

from __future__ import annotations

from torch import Tensor, nn

from fusiontree.ops import linear, linear_cross_entropy


class Linear(nn.Linear):
    """(…, in) → (…, out)."""

    def __init__(self, in_features: int, out_features: int, bias: bool = False) -> None:
        super().__init__(in_features, out_features, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class LMHead(Linear):
    """Hidden states (…, H) → logits (…, V)."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """With targets (T,) for x (T, H): the summed cross entropy instead, -100 ignored, logits never in memory.

        The weight is read in here alone: engines that shard parameters bring them together for a module's own forward.
        """
        return super().forward(x) if targets is None else linear_cross_entropy(x, self.weight, targets)
