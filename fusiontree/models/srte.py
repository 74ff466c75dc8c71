"""SRTE, the shared relative time encoding: a vector per position, added to the Mamba branch's input only."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from fusiontree.errors import ConfigError
from fusiontree.models.config import HybridConfig
from fusiontree.models.linear import Linear


class SRTE(nn.Module):
    """Encodes positions (B, L) as (B, L, H).

    kind `sincos`: computed on demand, any length, scaled by one learned number; `learned`: a full table of
    max_position_embeddings × H; `low_rank`: the same factorised at `srte_rank`.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.kind = config.srte
        self.hidden_size = config.hidden_size
        self.length = config.max_position_embeddings
        if self.kind == "sincos":
            self.scale = nn.Parameter(torch.empty(1))
        elif self.kind == "learned":
            self.table = nn.Embedding(self.length, config.hidden_size)
        else:
            self.table = nn.Embedding(self.length, config.srte_rank)
            self.up = Linear(config.srte_rank, config.hidden_size)

    def forward(self, ids: Tensor, longest: int) -> Tensor:
        """ids (B, L), all below `longest` → (B, L, H) fp32 or the table's dtype."""
        if self.kind == "sincos":
            return self._sincos(ids) * self.scale
        if longest > self.length:
            raise ConfigError(
                f"position {longest - 1} is beyond the learned time encoding: max_position_embeddings={self.length} "
                "(srte=sincos has no such limit)"
            )
        encoded: Tensor = self.table(ids)
        return encoded if self.kind == "learned" else self.up(encoded)

    def _sincos(self, ids: Tensor) -> Tensor:
        half = (self.hidden_size + 1) // 2
        frequency = torch.exp(torch.arange(half, dtype=torch.float32, device=ids.device) * (-math.log(10000.0) / half))
        angle = ids[..., None].float() * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., : self.hidden_size]
