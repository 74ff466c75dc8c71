"""Depthwise causal convolution over time with SiLU, with state and document resets.

    y[t, d] = silu(bias[d] + sum_k weight[d, K-1-k] * x[t-k, d])     k = 0 … K-1, t-k in the same document

Shapes: B batch, L tokens, D channels, K kernel width. State: the last K-1 inputs, (B, D, K-1), oldest first; nothing
from before the last document start is carried on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None, state: Tensor | None = None
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


def causal_conv1d_step(x: Tensor, weight: Tensor, bias: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """One token: x (B, D), weight (D, K), bias (D,), state (B, D, K-1) → y (B, D), new state."""
    window = torch.cat([state, x[:, :, None]], dim=-1)
    y = torch.addcmul(bias.float(), window[..., 0].float(), weight[:, 0].float())
    for k in range(1, weight.shape[1]):
        y = torch.addcmul(y, window[..., k].float(), weight[:, k].float())
    return F.silu(y).to(x.dtype), window[:, :, 1:]


def causal_conv1d(
    x: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None = None, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """All tokens at once: x (B, L, D), weight (D, K), bias (D,), starts (B, L) bool, state (B, D, K-1).

    Returns y (B, L, D) in x's dtype, computed in fp32, and the new state.
    """
    width = weight.shape[-1]
    if state is None:
        past = F.pad(x, (0, 0, width - 1, 0))
    else:
        past = torch.cat([state.transpose(1, 2).to(x.dtype), x], dim=1)
    new_state = past[:, x.shape[1] :]
    foreign: list[Tensor] = []
    if starts is not None:
        foreign = _foreign_tokens(starts, width)
        new_state = new_state * _own_tail(starts, width - 1)[..., None]
    y: Tensor = _ConvSiLU.apply(past, weight, bias, *foreign)
    return y, new_state.transpose(1, 2)


def _foreign_tokens(starts: Tensor, width: int) -> list[Tensor]:
    """For each lag k = 1 … K-1 the (row, token) pairs (2, n) whose input k back lies in another document."""
    foreign, started = [], torch.zeros_like(starts)
    for k in range(1, width):
        started = started | F.pad(starts, (k - 1, 0))[:, : starts.shape[1]]
        foreign.append(started.nonzero().t())
    return foreign


def _own_tail(starts: Tensor, size: int) -> Tensor:
    """Which of the last `size` inputs (B, size) belong to the document at the end: none starts after them."""
    later = F.pad(starts, (size, 1))
    later = later[:, later.shape[1] - size :]
    return later.flip(1).cumsum(1).flip(1) == 0


class _ConvSiLU(torch.autograd.Function):
    """K shifted multiply-adds with the channels innermost: what a depthwise convolution is, without its transposes.

    past: (B, K-1+L, D). The few tokens near a document's start take the foreign inputs back out again.
    """

    @staticmethod
    def forward(ctx: Any, past: Tensor, weight: Tensor, bias: Tensor, *foreign: Tensor) -> Tensor:
        pre = _convolve(past.float(), weight.float(), bias.float(), foreign)
        ctx.save_for_backward(past, weight, bias, *foreign)
        return F.silu(pre).to(past.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        past, weight, bias, *foreign = ctx.saved_tensors
        past32, w = past.float(), weight.float()
        length, width = past.shape[1] - w.shape[1] + 1, w.shape[1]
        pre = _convolve(past32, w, bias.float(), foreign)
        grad = torch.ops.aten.silu_backward(grads[0].float(), pre)
        grad_past, grad_weight = torch.zeros_like(past32), torch.empty_like(w)
        for k in range(width):
            begin = width - 1 - k
            inputs = past32[:, begin : begin + length]
            grad_past[:, begin : begin + length].addcmul_(grad, w[:, begin])
            grad_weight[:, begin] = _channel_dot(grad, inputs)
            if k and foreign:
                row, token = foreign[k - 1]
                source, at = past32[row, token + begin], grad[row, token]
                grad_weight[:, begin] -= (source * at).sum(0)
                grad_past.index_put_((row, token + begin), at * -w[:, begin], accumulate=True)
        grad_bias = grad.sum((0, 1)).to(bias.dtype)
        return grad_past.to(past.dtype), grad_weight.to(weight.dtype), grad_bias, *[None] * len(foreign)


def _convolve(past: Tensor, weight: Tensor, bias: Tensor, foreign: Any) -> Tensor:
    """The sum before SiLU, fp32: past (B, K-1+L, D) → (B, L, D)."""
    width = weight.shape[1]
    length = past.shape[1] - width + 1
    pre = torch.addcmul(bias, past[:, :length], weight[:, 0])
    for begin in range(1, width):
        pre.addcmul_(past[:, begin : begin + length], weight[:, begin])
    for k, pairs in enumerate(foreign, start=1):
        row, token = pairs
        begin = width - 1 - k
        pre.index_put_((row, token), past[row, token + begin] * -weight[:, begin], accumulate=True)
    return pre


def _channel_dot(a: Tensor, b: Tensor) -> Tensor:
    """Sum over batch and tokens of a·b (B, L, D) → (D,)."""
    return (a * b).sum((0, 1))
