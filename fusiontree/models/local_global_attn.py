"""The attention branch: the first heads see everything, the others the last W keys, the query included.

Shapes: B batch, L tokens, D hidden, H query heads, K key/value heads, P head size, W window.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.config import HybridConfig, LayerSpec
from fusiontree.models.kv_buffer import KVBuffer
from fusiontree.models.linear import Linear
from fusiontree.models.positions import Positions, rotate
from fusiontree.models.segments import Segments
from fusiontree.ops import attention


class LocalGlobalAttention(nn.Module):
    """(B, L, D) → (B, L, D). MHA, GQA or MQA by `num_key_value_heads`; RoPE inside."""

    def __init__(self, config: HybridConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        self.window = spec.sliding_window
        self.global_heads = _global_heads(config, spec)
        self.qkv_proj = Linear(config.hidden_size, (self.heads + 2 * self.kv_heads) * self.head_dim)
        self.o_proj = Linear(self.heads * self.head_dim, config.hidden_size)

    def forward(
        self, x: Tensor, positions: Positions, segments: Segments, cache: HybridCacheLayer | None = None
    ) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, (-1, self.head_dim))
        qk, v = qkv.split([self.heads + self.kv_heads, self.kv_heads], dim=2)
        assert positions.rotary is not None
        q, k = rotate(qk, positions.rotary).transpose(1, 2).split([self.heads, self.kv_heads], dim=1)
        v = v.transpose(1, 2)
        outputs = [
            self._group(q, k, v, segments, cache, heads, window)
            for heads, window in (
                (range(self.global_heads), None),
                (range(self.global_heads, self.heads), self.window),
            )
            if len(heads)
        ]
        mixed = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))

    def _group(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        segments: Segments,
        cache: HybridCacheLayer | None,
        heads: range,
        window: int | None,
    ) -> Tensor:
        """Attention of neighbouring query heads that share a window: (B, len(heads), L, P)."""
        shares = self.heads // self.kv_heads
        # The key/value heads these query heads use, and all query heads of those: attention wants whole groups.
        first, last = heads.start // shares, (heads.stop - 1) // shares + 1
        k, v = k[:, first:last], v[:, first:last]
        if cache is not None:
            buffer: KVBuffer = cache.everywhere if window is None else cache.local
            k, v = buffer.extend(k, v, segments.pads, cache.record_past)
        if q.shape[2] == 1 or len(heads) == (last - first) * shares:
            # One query: the few extra heads cost less than copying keys for each of the others.
            mixed = attention(q[:, first * shares : last * shares], k, v, window, segments.reach, segments.masks)
            begin = heads.start - first * shares
            return mixed[:, begin : begin + len(heads)]
        index = torch.tensor([h // shares - first for h in heads], device=k.device)
        q, k, v = q[:, heads.start : heads.stop], k.index_select(1, index), v.index_select(1, index)
        return attention(q, k, v, window, segments.reach, segments.masks)


def windows_of(config: HybridConfig, spec: LayerSpec) -> list[int | None]:
    """The windows that the layer's groups of heads have, None for those that see everything."""
    wide = _global_heads(config, spec)
    return [None] * (wide > 0) + [spec.sliding_window] * (wide < config.num_attention_heads)


def _global_heads(config: HybridConfig, spec: LayerSpec) -> int:
    return config.num_attention_heads if spec.sliding_window is None else spec.global_heads
