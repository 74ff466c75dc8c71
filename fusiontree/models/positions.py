"""Positions of a forward pass: ids, the RoPE cos/sin read from one table that all layers share, ALiBi's slopes."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fusiontree.models.config import HybridConfig

_FAST, _SLOW = 32.0, 1.0  # YaRN: turns over the original length above which a pair stays, below which it is stretched


@dataclass
class Positions:
    """What mixers know of where their tokens stand. B batch, L tokens, P head size."""

    ids: Tensor  # (B, L) int64, index within the document
    rotary: tuple[Tensor, Tensor] | None = None  # cos, sin (B, L, 1, P/2) in the compute dtype
    srte: Tensor | None = None  # (B, L, H) the time encoding that all layers share
    slopes: dict[int, Tensor] = field(default_factory=dict)  # ALiBi: heads in a group → (heads,) fp32


class RotaryTable:
    """cos/sin of RoPE (Su et al. 2021), grown on demand, shared by all layers. Not a parameter, not saved.

    Scaling for texts longer than those trained on: `linear` divides positions by the factor (Chen et al. 2023,
    arXiv:2306.15595); `ntk` raises the base so that the slowest pair turns that much slower and the fastest hardly;
    `yarn` (Peng et al. 2023, arXiv:2309.00071) divides the slow pairs only, and sharpens attention a little.
    """

    def __init__(self, config: HybridConfig) -> None:
        self.head_dim = config.head_dim
        self.theta = config.rope_theta
        self.factor = config.rope_factor
        self.stretch = config.rope_factor if config.rope_scaling == "linear" else 1.0
        if config.rope_scaling == "ntk" and self.head_dim > 2:
            self.theta *= config.rope_factor ** (self.head_dim / (self.head_dim - 2))
        self.yarn = config.rope_scaling == "yarn"
        self.original_length = config.rope_original_length or config.max_position_embeddings
        self.scale = 0.1 * math.log(self.factor) + 1.0 if self.yarn and self.factor > 1 else 1.0
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
            if self.yarn:
                frequency = frequency * self._kept(device)
            angle = torch.arange(length, dtype=torch.float32, device=device)[:, None] * frequency / self.stretch
            table = torch.cat([angle.cos(), angle.sin()], dim=-1)
            return table if self.scale == 1.0 else table * self.scale

    def _kept(self, device: torch.device) -> Tensor:
        """YaRN: what is left of each pair's frequency (P/2,), 1 for the fast ones and 1/factor for the slow."""
        low, high = (self._pair_that_turns(times) for times in (_FAST, _SLOW))
        low, high = max(math.floor(low), 0), min(math.ceil(high), self.head_dim - 1)
        pair = torch.arange(self.head_dim // 2, dtype=torch.float32, device=device)
        slow = ((pair - low) / max(high - low, 1e-3)).clamp(0, 1)
        return 1.0 - slow + slow / self.factor

    def _pair_that_turns(self, times: float) -> float:
        """Index of the pair that turns so many times over the original length."""
        return self.head_dim * math.log(self.original_length / (times * 2 * math.pi)) / (2 * math.log(self.theta))


@functools.lru_cache(maxsize=64)
def alibi_slopes(heads: int, device: torch.device) -> Tensor:
    """Slopes (heads,) fp32 of ALiBi (Press et al. 2021): 2^(-8 i / heads) for a power of two, else those of the power
    below, and then every second one of the power above."""
    whole = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * i / whole) for i in range(1, whole + 1)]
    slopes += [2.0 ** (-4.0 * i / whole) for i in range(1, 2 * (heads - whole) + 1, 2)]
    with torch.inference_mode(False):
        return torch.tensor(slopes, dtype=torch.float32, device=device)


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Turn the channel pairs (i, i + P/2) of x (B, L, H, P) by their position's angle."""
    cos, sin = rotary
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
