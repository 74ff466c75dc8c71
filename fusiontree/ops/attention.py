"""Causal attention with a window of W keys (the query itself included), or with none, through SDPA.

Keys come as one run: the cached ones first, then one per query. Query i of L sits in slot S - L + i of S keys.
`reach` (B, L), when given, is how many keys back a query may see, itself included: its index in its own document + 1.
It carries document boundaries and left padding alike. Without it every earlier key is visible.

Windows run in blocks (products on a CPU, SDPA elsewhere); `FUSIONTREE_ATTENTION=flex` takes FlexAttention instead.

Shapes: B batch, H query heads, K key/value heads (H a multiple of K), L queries, S keys, P head size, W window.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.errors import ConfigError
from fusiontree.ops.flex import flex_window, remember_block_mask

_BACKEND = os.environ.get("FUSIONTREE_ATTENTION", "blocks")
if _BACKEND not in ("blocks", "flex"):
    raise ConfigError(f"FUSIONTREE_ATTENTION={_BACKEND!r}: must be blocks or flex")
MaskMemo = dict[tuple, Any]
_BLOCK_BUDGET = 1 << 22  # mask elements per batch row that one call may build for heads that see everything


def attention_reference(
    q: Tensor, k: Tensor, v: Tensor, window: int | None, reach: Tensor | None = None, slopes: Tensor | None = None
) -> Tensor:
    """The definition, with the L×S mask in the open: fp32 softmax over the visible keys. Shapes as `attention`."""
    k, v = (repeat_heads(t, q.shape[1]) for t in (k, v))
    scores = q.float() @ k.float().transpose(-1, -2) / q.shape[-1] ** 0.5
    visible = _visible(q.shape[2], k.shape[2], window, reach, q.device)
    if slopes is not None:
        back = torch.arange(k.shape[2] - q.shape[2], k.shape[2])[:, None] - torch.arange(k.shape[2])
        scores = scores - slopes[:, None, None] * back.to(q.device)
    return (scores.masked_fill(~visible, -torch.inf).softmax(-1) @ v.float()).to(q.dtype)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int | None,
    reach: Tensor | None = None,
    masks: MaskMemo | None = None,
    slopes: Tensor | None = None,
) -> Tensor:
    """q (B, H, L, P), k and v (B, K, S, P), S ≥ L → (B, H, L, P). `window` None: every earlier key; W: the last W keys.

    `masks` remembers masks between calls that have the same `reach` and L, as the layers of one forward pass do.
    `slopes` (H,): ALiBi, a score falls by its head's slope per key back; two calls that share `masks` and H share them.
    """
    masks = {} if masks is None else masks
    length, keys = q.shape[2], k.shape[2]
    if window is not None and window < keys:
        if length == 1:
            k, v = k[:, :, -window:], v[:, :, -window:]
        elif _BACKEND == "flex":
            return flex_window(q, k, v, window, reach, masks, slopes)
        else:
            return _windowed(q, k, v, window, reach, masks, slopes)
    if reach is None and length == 1:
        return _sdpa(q, k, v, None if slopes is None else _fall(slopes, 1, k.shape[2], q.dtype))
    if reach is None and length == keys and slopes is None:
        return _sdpa(q, k, v, causal=True)
    return _by_query_blocks(q, k, v, reach, masks, slopes)


def remember_mask(
    masks: MaskMemo,
    length: int,
    window: int | None,
    reach: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    slopes: Tensor | None = None,
) -> None:
    """Build ahead the mask that `attention` over `length` queries and as many keys would put into `masks`."""
    if window is not None and window < length and length > 1:
        if _BACKEND == "flex":
            remember_block_mask(masks, length, length, window, reach, device)
        else:
            _window_addend(masks, length, length, window, reach, dtype, device)
            _window_fall(masks, length, window, slopes, dtype)
    elif slopes is not None and length > 1 and query_block(length, length, len(slopes)) >= length:
        _whole_addend(masks, length, length, reach, dtype, device, slopes)
    elif slopes is None and reach is not None and query_block(length, length) >= length:
        _whole_addend(masks, length, length, reach, dtype, device, None)


def repeat_heads(t: Tensor, heads: int) -> Tensor:
    """(B, K, …) → (B, H, …): each key/value head serves H/K neighbouring query heads."""
    return t if t.shape[1] == heads else t.repeat_interleave(heads // t.shape[1], dim=1)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    heads, length = q.shape[1], q.shape[2]
    if k.shape[1] != heads and length == 1:
        # The query heads that share a key head stand as that head's queries: no copy of the cache.
        q = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
        if mask is not None and mask.shape[1] == heads:
            mask = mask.reshape(mask.shape[0], k.shape[1], -1, mask.shape[3])
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).reshape(k.shape[0], heads, 1, -1)
    k, v = repeat_heads(k, heads), repeat_heads(v, heads)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)


def _visible(length: int, keys: int, window: int | None, reach: Tensor | None, device: torch.device) -> Tensor:
    """Who sees whom: (L, S) bool, or (B, 1, L, S) with `reach`."""
    back = torch.arange(keys - length, keys, device=device)[:, None] - torch.arange(keys, device=device)
    visible = back >= 0
    if window is not None:
        visible = visible & (back < window)
    return visible if reach is None else visible & (back < reach[:, None, :, None])


def _remembered(
    masks: MaskMemo,
    key: tuple,
    dtype: torch.dtype,
    build: Callable[[], Tensor],
    fall: Callable[[], Tensor] | None = None,
) -> Tensor:
    """The mask as an addend in the queries' dtype, the form every SDPA backend takes; with `fall` added, ALiBi's."""
    mask: Tensor | None = masks.get((*key, dtype))
    if mask is None:
        visible = build()
        mask = torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)
        mask = mask if fall is None else mask + fall()
        masks[(*key, dtype)] = mask
    return mask


def _fall(slopes: Tensor, length: int, keys: int, dtype: torch.dtype) -> Tensor:
    """What ALiBi adds to the scores (1, H, L, S) of the last L of S slots."""
    back = torch.arange(keys - length, keys, device=slopes.device)[:, None] - torch.arange(keys, device=slopes.device)
    return (-slopes[:, None, None] * back).to(dtype)[None]


def _by_query_blocks(
    q: Tensor, k: Tensor, v: Tensor, reach: Tensor | None, masks: MaskMemo, slopes: Tensor | None
) -> Tensor:
    """Masked attention over everything before, in blocks of queries, so that no mask grows as L²."""
    length, keys = q.shape[2], k.shape[2]
    size = query_block(length, keys, 1 if slopes is None else len(slopes))
    if size >= length and (reach is not None or slopes is not None):
        return _sdpa(q, k, v, _whole_addend(masks, length, keys, reach, q.dtype, q.device, slopes))
    if size < length:
        # Once for all blocks: every block's own copy would be kept for the backward.
        k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
    outputs = []
    for begin in range(0, length, size):
        end = min(begin + size, length)
        upto = keys - length + end
        if reach is None:
            # Who sees whom depends on the distance alone: the mask of the last block, cut on the left, serves all.
            build = partial(_visible, size, keys, None, None, q.device)
            fall = None if slopes is None else partial(_fall, slopes, size, keys, q.dtype)
            key = ("last", size, keys, 0 if slopes is None else len(slopes))
            mask = _remembered(masks, key, q.dtype, build, fall)[..., begin - end :, keys - upto :]
        else:
            # Not kept: the masks of several blocks would add up to L².
            mask = _whole_addend({}, end - begin, upto, reach[:, begin:end], q.dtype, q.device, slopes)
        outputs.append(_sdpa(q[:, :, begin:end], k[:, :, :upto], v[:, :, :upto], mask))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def query_block(length: int, keys: int, masks: int = 1) -> int:
    """Queries that heads that see everything take at once where they need a mask, or as many as there are slopes."""
    return max(1, min(length, _BLOCK_BUDGET // (keys * masks)))


def window_blocks(length: int, window: int) -> tuple[int, int]:
    """Queries in a block of windowed attention, and key blocks before each block's own that they can see."""
    block = max(window // 4, 32)
    block = block if block < length else length  # not min(): compiled for any length, this stays a plain number
    return block, -(-window // block)


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, window: int, reach: Tensor | None, masks: MaskMemo, slopes: Tensor | None
) -> Tensor:
    """Blocks of Q queries, each with the keys it can see and the rest of their blocks: work and memory grow as L·W."""
    heads, length, keys = q.shape[1], q.shape[2], k.shape[2]
    Q, m = window_blocks(length, window)
    n = -(-length // Q)
    # Keys missing in front (superfluous if negative), and queries behind, to fill whole blocks.
    before, after = length + m * Q - keys, n * Q - length
    q_blocks = F.pad(q, (0, 0, 0, after)).unflatten(2, (n, Q))
    k_blocks, v_blocks = (_key_windows(F.pad(repeat_heads(t, heads), (0, 0, before, after)), Q, m) for t in (k, v))
    mask = _window_addend(masks, length, keys, window, reach, q.dtype, q.device)
    fall = _window_fall(masks, length, window, slopes, q.dtype)
    inner = _block_products if q.device.type == "cpu" else _block_sdpa
    return inner(q_blocks, k_blocks, v_blocks, mask, fall).flatten(2, 3)[:, :, :length]


def _key_windows(t: Tensor, Q: int, m: int) -> Tensor:
    """(B, H, (n + m)·Q, P) → (B, H, n, (m + 1)·Q, P): each block with the m before it."""
    blocks = t.unflatten(2, (-1, Q))
    n = blocks.shape[2] - m
    return torch.cat([blocks[:, :, i : i + n] for i in range(m + 1)], dim=3)


def _block_products(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, fall: Tensor | None) -> Tensor:
    """Scores in the open: for blocks this small a CPU is three times as fast, both ways, as in its flash kernel."""
    scores = torch.matmul(q * q.shape[-1] ** -0.5, k.transpose(-1, -2))
    scores += mask
    if fall is not None:
        scores += fall
    return torch.matmul(scores.softmax(-1), v)


def _block_sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, fall: Tensor | None) -> Tensor:
    """The same through SDPA, blocks as batch rows: no scores in memory on a GPU (with ALiBi a mask of their size)."""
    batch = q.shape[0]
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    mask = mask if fall is None else mask + fall
    mask = mask.expand(batch, -1, *mask.shape[2:]).transpose(1, 2).flatten(0, 1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).unflatten(0, (batch, -1)).transpose(1, 2)


def _whole_addend(
    masks: MaskMemo,
    length: int,
    keys: int,
    reach: Tensor | None,
    dtype: torch.dtype,
    device: torch.device,
    slopes: Tensor | None,
) -> Tensor:
    # L is one in a forward pass. The keys before the first query tell masks apart, a number that no other L changes.
    key = ("all", keys - length, 0 if slopes is None else len(slopes))
    fall = None if slopes is None else partial(_fall, slopes, length, keys, dtype)
    return _remembered(masks, key, dtype, partial(_visible, length, keys, None, reach, device), fall)


def _window_fall(masks: MaskMemo, length: int, window: int, slopes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """ALiBi's part of the scores in blocks, the same for each (H, 1, Q, (m + 1)·Q)."""
    if slopes is None:
        return None
    key = ("fall", window, len(slopes), dtype)
    if key not in masks:
        Q, m = window_blocks(length, window)
        masks[key] = _fall(slopes, Q, (m + 1) * Q, dtype)[0, :, None]
    fall: Tensor = masks[key]
    return fall


def _window_addend(
    masks: MaskMemo, length: int, keys: int, window: int, reach: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    key = ("window", window, keys - length)
    return _remembered(masks, key, dtype, partial(_window_mask, length, keys, window, reach, device))


def _window_mask(length: int, keys: int, window: int, reach: Tensor | None, device: torch.device) -> Tensor:
    """(1 or B, 1, n, Q, (m + 1)·Q) bool: at most W keys back, not before the first key, not before the own document."""
    Q, m = window_blocks(length, window)
    n = -(-length // Q)
    slot = torch.arange(n * Q, device=device).view(n, Q) + keys - length
    own = torch.clamp(slot + 1, max=window)[None]  # keys that exist, the query included
    if reach is not None:
        own = torch.minimum(own, F.pad(reach, (0, n * Q - length), value=1).view(-1, n, Q))
    back = torch.arange(Q, device=device)[:, None] + m * Q - torch.arange((m + 1) * Q, device=device)
    return ((back >= 0) & (back < own[..., None]))[:, None]
