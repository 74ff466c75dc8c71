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
        if self.kind == "sincos":
            self.scale = nn.Parameter(torch.empty(1))
        elif self.kind == "learned":
            self.table = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        else:
            self.table = nn.Embedding(config.max_position_embeddings, config.srte_rank)
            self.up = Linear(config.srte_rank, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        """ids (B, L), within reach → (B, L, H) fp32 or the table's dtype."""
        if self.kind == "sincos":
            return self._sincos(ids) * self.scale
        encoded: Tensor = self.table(ids)
        return encoded if self.kind == "learned" else self.up(encoded)

    def _sincos(self, ids: Tensor) -> Tensor:
        half = (self.hidden_size + 1) // 2
        frequency = torch.exp(torch.arange(half, dtype=torch.float32, device=ids.device) * (-math.log(10000.0) / half))
        angle = ids[..., None].float() * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)[..., : self.hidden_size]


def check_reach(config: HybridConfig, longest: int) -> None:
    """Refuse positions up to `longest` - 1 where the time encoding is a table that ends before."""
    if config.srte != "sincos":
        check_table(config, longest, "time encoding", "srte=sincos")


def check_table(
    config: HybridConfig, longest: int, what: str = "positions", otherwise: str = "position_encoding=rope"
) -> None:
    """Refuse positions up to `longest` - 1 beyond the end of a learned table."""
    end = config.max_position_embeddings
    if longest > end:
        raise ConfigError(
            f"position {longest - 1} is beyond the learned {what}: max_position_embeddings={end} "
            f"({otherwise} has no such limit)"
        )
