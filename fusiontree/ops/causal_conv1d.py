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
    if starts is not None:
        new_state = new_state * _own_tail(starts, width - 1)[..., None]
    if torch.compiler.is_compiling():
        y = F.silu(_convolve_masked(past, weight, bias, starts)).to(x.dtype)
    else:
        near = (None, None) if starts is None else _near_starts(starts, width)
        y = _ConvSiLU.apply(past, weight, bias, *near)
    # A copy: a cache that kept a view would keep the whole input alive.
    return y, new_state.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def _near_starts(starts: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The n tokens that follow a start too closely to use all K inputs, as (row, token) (2, n), and which of their
    inputs, oldest first, are of their own document (n, K)."""
    foreign = _foreign(starts, width)
    near = foreign[-1].nonzero().t()
    own = ~torch.stack(foreign[::-1], dim=-1)
    return near, own[near[0], near[1]]


def _foreign(starts: Tensor, width: int) -> list[Tensor]:
    """Per distance 0 … K-1, whether the input that far back (B, L) is of another document."""
    foreign = [torch.zeros_like(starts)]
    for k in range(1, width):
        foreign.append(foreign[-1] | F.pad(starts, (k - 1, 0))[:, : starts.shape[1]])
    return foreign


def _own_tail(starts: Tensor, size: int) -> Tensor:
    """Which of the last `size` inputs (B, size) belong to the document at the end: none starts after them."""
    later = F.pad(starts, (size, 1))
    later = later[:, later.shape[1] - size :]
    return later.flip(1).cumsum(1).flip(1) == 0


class _ConvSiLU(torch.autograd.Function):
    """K shifted multiply-adds with the channels innermost: what a depthwise convolution is, without its transposes.

    past: (B, K-1+L, D). The few tokens near a document's start are computed apart, from their own document's inputs.
    """

    @staticmethod
    def forward(
        ctx: Any, past: Tensor, weight: Tensor, bias: Tensor, near: Tensor | None, own: Tensor | None
    ) -> Tensor:
        pre = _convolve(past.float(), weight.float(), bias.float(), near, own)
        ctx.save_for_backward(past, weight, bias, near, own)
        return F.silu(pre).to(past.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        past, weight, bias, near, own = ctx.saved_tensors
        past32, w = past.float(), weight.float()
        width, length = w.shape[1], past.shape[1] - w.shape[1] + 1
        pre = _convolve(past32, w, bias.float(), near, own)
        grad = torch.ops.aten.silu_backward(grads[0].float(), pre)
        grad_bias = grad.sum((0, 1))
        grad_past, grad_weight = torch.zeros_like(past32), torch.zeros_like(w)
        if near is not None:
            row, token = near
            at = grad[row, token]
            slots = token[:, None] + torch.arange(width, device=token.device)
            inputs = torch.where(own[..., None], past32[row[:, None], slots], 0.0)
            grad_weight += torch.einsum("nkd,nd->dk", inputs, at)
            grad_inputs = torch.where(own[..., None], at[:, None] * w.t(), 0.0)
            grad_past.index_put_((row[:, None], slots), grad_inputs, accumulate=True)
            grad[row, token] = 0.0
        for k in range(width):
            inputs = past32[:, k : k + length]
            grad_past[:, k : k + length].addcmul_(grad, w[:, k])
            grad_weight[:, k] += (grad * inputs).sum((0, 1))
        return grad_past.to(past.dtype), grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None, None


def _convolve(past: Tensor, weight: Tensor, bias: Tensor, near: Tensor | None, own: Tensor | None) -> Tensor:
    """The sum before SiLU, fp32: past (B, K-1+L, D) → (B, L, D)."""
    width = weight.shape[1]
    length = past.shape[1] - width + 1
    pre = torch.addcmul(bias, past[:, :length], weight[:, 0])
    for k in range(1, width):
        pre.addcmul_(past[:, k : k + length], weight[:, k])
    if near is not None and own is not None:
        row, token = near
        inputs = past[row[:, None], token[:, None] + torch.arange(width, device=token.device)]
        pre[row, token] = bias + torch.einsum("nkd,dk->nd", torch.where(own[..., None], inputs, 0.0), weight)
    return pre


def _convolve_masked(past: Tensor, weight: Tensor, bias: Tensor, starts: Tensor | None) -> Tensor:
    """`_convolve` in plain steps of one size whatever `starts` says, for a compiler that makes one loop of them."""
    width = weight.shape[1]
    length = past.shape[1] - width + 1
    foreign = None if starts is None else _foreign(starts, width)
    pre = bias.float()
    for k in range(width):
        inputs = past[:, k : k + length].float()
        if foreign is not None:
            inputs = torch.where(foreign[width - 1 - k][..., None], 0.0, inputs)
        pre = pre + inputs * weight[:, k].float()
    return pre
