"""Positions of a forward pass: ids, and the RoPE cos/sin read from one table that all layers share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fusiontree.models.config import HybridConfig


@dataclass
class Positions:
    """What mixers know of where their tokens stand. B batch, L tokens, P head size."""

    ids: Tensor  # (B, L) int64, index within the document
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin (B, L, 1, P/2) in the compute dtype
    srte: Tensor | None = None  # (B, L, H) the time encoding that all layers share


class RotaryTable:
    """cos/sin of RoPE (Su et al. 2021), grown on demand, shared by all layers. Not a parameter, not saved.

    Scaling for texts longer than those trained on: `linear` divides positions by the factor (Chen et al. 2023,
    arXiv:2306.15595); `ntk` raises the base so that the slowest pair turns that much slower and the fastest hardly.
    """

    def __init__(self, config: HybridConfig) -> None:
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        self.stretch = config.rope_factor if config.rope_scaling == "linear" else 1.0
        if config.rope_scaling == "ntk" and self.head_dim > 2:
            self.theta *= config.rope_factor ** (self.head_dim / (self.head_dim - 2))
        self._table: Tensor | None = None  # (positions, P): cos half, sin half, fp32

    def lookup(self, ids: Tensor, longest: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin (B, L, 1, P/2) at `ids`, all of which are below `longest`."""
        if self._table is None or self._table.shape[0] < longest or self._table.device != ids.device:
            have = 0 if self._table is None else self._table.shape[0]
            self._table = self._build(max(longest, 2 * have, 256), ids.device)
        cos, sin = self._table[ids][:, :, None].to(dtype).chunk(2, dim=-1)
        return cos, sin

    def _build(self, length: int, device: torch.device) -> Tensor:
        with torch.inference_mode(False), torch.no_grad():
            exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float32, device=device) / self.head_dim
            frequency = 1.0 / self.theta**exponent
            angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency / self.stretch
            return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the channel pairs (i, i + P/2) of x (B, L, H, P) by their position's angle."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
