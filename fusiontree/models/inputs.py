"""What a caller hands to `forward`, checked before it runs: a mistake is one clear line, not an error deep inside.

Shapes: B batch, L tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def check_tokens(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> None:
    """Exactly one of ids (B, L) and embeddings (B, L, H), of at least one token."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    name, given, sizes = (
        ("input_ids", input_ids, "(batch, length)")
        if inputs_embeds is None
        else ("inputs_embeds", inputs_embeds, "(batch, length, hidden)")
    )
    assert given is not None
    if given.ndim != sizes.count(",") + 1 or given.shape[1] == 0:
        raise ValueError(f"{name} must be {sizes} with at least one token, not {tuple(given.shape)}")


def valid_tokens(attention_mask: Tensor | None, rows: int, length: int, past: int) -> Tensor | None:
    """(B, L) bool for the new tokens, None when all are real. Any integer, bool or float mask of 0 and 1 will do."""
    if attention_mask is None:
        return None
    shape = tuple(attention_mask.shape)
    if len(shape) != 2 or shape[0] not in (1, rows) or shape[1] not in (length, past + length):
        raise ValueError(f"attention_mask must be ({rows}, {past} + {length}) with 0 at padding, not {shape}")
    valid = attention_mask[:, -length:] != 0
    return None if bool(valid.all()) else valid.expand(rows, length)


def described(name: str, value: Tensor | None, rows: int, length: int) -> Tensor | None:
    """A whole number per token, (B, L) or (1, L), as (B, L)."""
    if value is None:
        return None
    if value.dtype.is_floating_point or value.dtype == torch.bool:
        raise ValueError(f"{name} must be whole numbers, not {value.dtype}")
    if value.ndim > 2 or value.shape[-1:] != (length,) or (value.ndim == 2 and value.shape[0] not in (1, rows)):
        raise ValueError(f"{name} must be ({rows}, {length}), not {tuple(value.shape)}")
    return value.expand(rows, length)


def check_labels(labels: Tensor, rows: int, length: int) -> None:
    """One label per token, unshifted."""
    if tuple(labels.shape) != (rows, length):
        raise ValueError(f"labels must be ({rows}, {length}), one per token and unshifted, not {tuple(labels.shape)}")
