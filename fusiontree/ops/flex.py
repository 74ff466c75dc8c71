"""Window attention through PyTorch's FlexAttention: blocks that nobody sees are skipped, no mask stands in memory.

Chosen by `FUSIONTREE_ATTENTION=flex` (see `attention`). Compiled on a GPU; on a CPU it runs uncompiled, as a check of
the mask, with the scores in the open. Shapes as in `attention`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention


def flex_window(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    reach: Tensor | None,
    masks: dict[tuple, Any],
    slopes: Tensor | None = None,
) -> Tensor:
    """As `attention` with a window; `masks` remembers block masks between layers of one forward pass."""
    mask = remember_block_mask(masks, q.shape[2], k.shape[2], window, reach, q.device)
    run = _compiled() if q.device.type == "cuda" else flex_attention
    fall = None if slopes is None else _fall(slopes, k.shape[2] - q.shape[2])
    out: Tensor = run(q, k, v, score_mod=fall, block_mask=mask, enable_gqa=k.shape[1] != q.shape[1])
    return out


def remember_block_mask(
    masks: dict[tuple, Any], length: int, keys: int, window: int, reach: Tensor | None, device: torch.device
) -> BlockMask:
    """The block mask of a forward pass, built at first need."""
    key = ("flex", window, keys - length)
    if key not in masks:
        masks[key] = _block_mask(length, keys, window, reach, device)
    mask: BlockMask = masks[key]
    return mask


def _fall(slopes: Tensor, offset: int) -> Callable[..., Tensor]:
    """ALiBi: a score falls by its head's slope per key back."""

    def fallen(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[h] * (query + offset - key)

    return fallen


@functools.cache
def _compiled() -> Any:
    # Dynamic: compiled once, not again for every length.
    return torch.compile(flex_attention, dynamic=True)


def _block_mask(length: int, keys: int, window: int, reach: Tensor | None, device: torch.device) -> BlockMask:
    offset = keys - length

    def visible(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        back = query + offset - key
        seen = (back >= 0) & (back < window)
        return seen if reach is None else seen & (back < reach[b, query])

    batch = None if reach is None else reach.shape[0]
    return create_block_mask(visible, batch, None, length, keys, device=device)
