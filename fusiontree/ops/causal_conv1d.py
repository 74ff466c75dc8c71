"""Depthwise causal convolution over time, with state and document resets.

    y[t, d] = act(bias[d] + sum_k weight[d, K-1-k] * x[t-k, d])     k = 0 … K-1, t-k in the same document

Shapes: B batch, L tokens, D channels, K kernel width. State: the last K-1 inputs, (B, D, K-1), oldest first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One token after another. Arguments and results as `causal_conv1d`."""
    width = weight.shape[-1]
    window = x.new_zeros(x.shape[0], x.shape[2], width - 1) if state is None else state
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            window = window * (~starts[:, t])[:, None, None]
        y, window = causal_conv1d_step(x[:, t], weight, bias, window)
        outputs.append(y)
    return torch.stack(outputs, dim=1), window


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor | None, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x (B, D), weight (D, K), state (B, D, K-1) → y (B, D) after SiLU, new state."""
    window = torch.cat([state, x[:, :, None]], dim=-1)
    y = (window.float() * weight.float()).sum(-1)
    if bias is not None:
        y = y + bias.float()
    return F.silu(y).to(x.dtype), window[:, :, 1:]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor | None, starts: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once: x (B, L, D), weight (D, K), bias (D,), starts (B, L) bool, state (B, D, K-1).

    Returns y (B, L, D) after SiLU, in x's dtype, and the new state. A document's first tokens see zeros before them,
    in the state too: nothing from before the last start is carried on.
    """
    width = weight.shape[-1]
    if state is None:
        past = F.pad(x, (0, 0, width - 1, 0))
    else:
        past = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)
    weight, bias = weight.to(x.dtype), None if bias is None else bias.to(x.dtype)
    y = F.conv1d(past.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    new_state = past[:, x.shape[1] :]
    if starts is not None:
        y = y - _foreign_part(past, weight, starts)
        new_state = new_state * _own_tail(starts, width - 1)[..., None]
    return F.silu(y), new_state.transpose(1, 2)


def _own_tail(starts: Tensor, size: int) -> Tensor:
    """Which of the last `size` inputs (B, size) belong to the document at the end: none starts after them."""
    later = F.pad(starts, (size, 1))[:, -size:]
    return later.flip(1).cumsum(1).flip(1) == 0


def _foreign_part(past: Tensor, weight: Tensor, starts: Tensor) -> Tensor:
    """What the plain convolution added across a document boundary; past (B, K-1+L, D) → (B, L, D)."""
    width, length = weight.shape[-1], starts.shape[1]
    foreign = past.new_zeros(past.shape[0], length, past.shape[2])
    started = torch.zeros_like(starts)
    for k in range(1, width):
        # started: a document begins in (t-k, t], so the input k tokens back belongs to another document.
        started = started | F.pad(starts, (k - 1, 0))[:, :length]
        shifted = past[:, width - 1 - k : width - 1 - k + length]
        foreign = foreign + (shifted * started[..., None]) * weight[:, width - 1 - k]
    return foreign
