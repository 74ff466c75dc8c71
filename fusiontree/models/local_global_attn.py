"""The attention branch: the first heads see everything, the others the last W keys, the query included.

Shapes: B batch, L tokens, D hidden, H query heads, K key/value heads, P head size, W window.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.config import HybridConfig, LayerSpec
from fusiontree.models.kv_buffer import KVBuffer
from fusiontree.models.linear import Linear
from fusiontree.models.positions import Positions, rotate
from fusiontree.models.segments import Segments
from fusiontree.ops import attention


class HeadGroup(NamedTuple):
    """Neighbouring query heads that share a window and a way of knowing positions."""

    heads: range
    window: int | None  # None: they see everything
    position: str  # rope, alibi or none


def head_groups(config: HybridConfig, spec: LayerSpec) -> list[HeadGroup]:
    """The layer's heads: first those that see everything, then those with a window."""
    heads = config.num_attention_heads
    wide = heads if spec.sliding_window is None else spec.global_heads
    groups = [
        HeadGroup(range(wide), None, config.head_positions(True)),
        HeadGroup(range(wide, heads), spec.sliding_window, config.head_positions(False)),
    ]
    return [group for group in groups if len(group.heads)]


class LocalGlobalAttention(nn.Module):
    """(B, L, D) → (B, L, D). MHA, GQA or MQA by `num_key_value_heads`; positions inside, by group of heads."""

    def __init__(self, config: HybridConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.groups = head_groups(config, spec)
        self.qkv_proj = Linear(
            config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim, config.attention_bias
        )
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size, config.attention_bias)

    def forward(
        self, x: Tensor, positions: Positions, segments: Segments, cache: HybridCacheLayer | None = None
    ) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        placed = {name: self._placed(qk, name, positions) for name in {group.position for group in self.groups}}
        v = v.transpose(1, 2)
        outputs = [self._group(*placed[group.position], v, positions, segments, cache, group) for group in self.groups]
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _placed(self, qk: Tensor, position: str, positions: Positions) -> tuple[Tensor, Tensor]:
        """Queries (B, H, L, P) and keys (B, K, L, P), turned by their positions where that is how they are known."""
        if position == "rope":
            assert positions.rotary is not None
            qk = rotate(qk, positions.rotary)
        q, k = qk.transpose(1, 2).split([self.heads, self.kv_heads], dim=1)
        return q, k

    def _group(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Positions,
        segments: Segments,
        cache: HybridCacheLayer | None,
        group: HeadGroup,
    ) -> Tensor:
        """Attention of one group of heads: (B, heads, L, P)."""
        heads, window = group.heads, group.window
        slopes = positions.slopes[len(heads)] if group.position == "alibi" else None
        shares = self.heads // self.kv_heads
        # The key/value heads these query heads use, and all query heads of those: attention wants whole groups.
        first, last = heads.start // shares, (heads.stop - 1) // shares + 1
        k, v = k[:, first:last], v[:, first:last]
        if cache is not None:
            buffer: KVBuffer = cache.everywhere if window is None else cache.local
            k, v = buffer.extend(k, v, segments.pads, cache.record_past)
        whole = len(heads) == (last - first) * shares
        if whole or (q.shape[2] == 1 and slopes is None):
            # One query: the few extra heads cost less than copying keys for each of the others.
            mixed = attention(
                q[:, first * shares : last * shares], k, v, window, segments.reach, segments.masks, slopes
            )
            begin = heads.start - first * shares
            return mixed[:, begin : begin + len(heads)]
        index = torch.tensor([h // shares - first for h in heads], device=k.device)
        q, k, v = q[:, heads.start : heads.stop], k.index_select(1, index), v.index_select(1, index)
        return attention(q, k, v, window, segments.reach, segments.masks, slopes)
