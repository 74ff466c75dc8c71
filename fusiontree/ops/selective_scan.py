"""Selective scan (Mamba-1): chunked scan, one-token step, and a step-by-step reference.

The recurrence, per batch row and channel (Gu & Dao 2023, arXiv:2312.00752, algorithm 2, simplified discretisation):

    state_t = exp(dt_t * A) * state_{t-1} + dt_t * x_t * B_t         state: (N,), A: (N,)
    y_t     = state_t · C_t + D * x_t

Every channel and every state decays at a rate of its own, so no scores are shared as in `ssd`. The states of some
tokens at a time are formed, by scans over short chunks that run side by side, and read in one product; the backward
forms them again.

Shapes: B batch, L tokens, E channels, N state, T tokens formed at a time.
A token with dt = 0 leaves the state as it is, which is how padding is made transparent.
A token with `starts` true begins a new document: it sees a zero state.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusiontree.ops.autocast import without_autocast

_CHUNK = 16  # steps of the scans that run side by side
_STATES_ON_CPU, _STATES_ON_GPU = 1 << 22, 1 << 26  # numbers of states formed at a time


def selective_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one token after another. Arguments and results as `selective_scan`."""
    state = x.new_zeros(x.shape[0], *A.shape, dtype=torch.float32) if initial_state is None else initial_state
    outputs = []
    for t in range(x.shape[1]):
        if starts is not None:
            state = state * (~starts[:, t])[:, None, None]
        y, state = selective_scan_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


@without_autocast
def selective_scan_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x and dt (B, E), A (E, N), B and C (B, N), state (B, E, N) fp32 → y (B, E), new state."""
    x32 = x.float()
    written = (x32 * dt)[:, :, None] * B.float()[:, None]
    state = torch.addcmul(written, state, torch.exp(dt[:, :, None] * A))
    y = torch.matmul(state, C.float()[:, :, None])[:, :, 0]
    if D is not None:
        y = torch.addcmul(y, x32, D)
    return y.to(x.dtype), state


@without_autocast
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """All tokens: x (B, L, E); dt (B, L, E) fp32, after softplus, 0 at padding; A (E, N) fp32, negative; B and C
    (B, L, N); D (E,) fp32; starts (B, L) bool; initial_state (B, E, N) fp32.

    Returns y (B, L, E) in x's dtype and the final state (B, E, N) in fp32. Any L ≥ 1. Differentiable once.
    """
    if initial_state is None:
        initial_state = torch.zeros(x.shape[0], *A.shape, dtype=torch.float32, device=x.device)
    x32 = x.float()
    y, final = _Scan.apply(x32, dt, A, B.float(), C.float(), starts, initial_state)
    if D is not None:
        y = torch.addcmul(y, x32, D)
    return y.to(x.dtype), final


def tokens_at_once(batch: int, channels: int, state: int, device: str) -> int:
    """Tokens whose states stand in memory together."""
    most = _STATES_ON_CPU if device == "cpu" else _STATES_ON_GPU
    return max(1, min(_CHUNK, most // (batch * channels * state * _CHUNK))) * _CHUNK


def _pieces(x: Tensor, A: Tensor) -> list[slice]:
    size = tokens_at_once(x.shape[0], A.shape[0], A.shape[1], x.device.type)
    return [slice(begin, begin + size) for begin in range(0, x.shape[1], size)]


class _Scan(torch.autograd.Function):
    """Piece by piece; kept for the backward are the inputs and the state that enters each piece."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, Tensor]:
        state, entering, outputs = initial.float(), [], []
        for piece in _pieces(x, A):
            entering.append(state)
            cut = None if starts is None else starts[:, piece]
            states = _states(_decay(dt[:, piece], A, cut), x[:, piece] * dt[:, piece], B[:, piece], state)
            outputs.append(torch.matmul(states, C[:, piece, :, None])[..., 0])
            state = states[:, -1].clone()
        ctx.save_for_backward(x, dt, A, B, C, starts, torch.stack(entering))
        return torch.cat(outputs, dim=1), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor, grad_state: Tensor) -> tuple[Tensor | None, ...]:
        x, dt, A, B, C, starts, entering = ctx.saved_tensors
        grads: list[list[Tensor]] = [[], [], [], []]  # of x, dt, B and C, the last piece first
        grad_A = torch.zeros_like(A)
        for piece, state in reversed(list(zip(_pieces(x, A), entering, strict=True))):
            cut = None if starts is None else starts[:, piece]
            *parts, more, grad_state = _backward(
                x[:, piece], dt[:, piece], A, B[:, piece], C[:, piece], cut, state, grad_y[:, piece], grad_state
            )
            grad_A += more
            for found, part in zip(grads, parts, strict=True):
                found.append(part)
        grad_x, grad_dt, grad_B, grad_C = (torch.cat(found[::-1], dim=1) for found in grads)
        return grad_x, grad_dt, grad_A, grad_B, grad_C, None, grad_state


def _decay(dt: Tensor, A: Tensor, starts: Tensor | None) -> Tensor:
    """exp(dt·A) (B, T, E, N); nothing passes into a document's first token."""
    decay = torch.exp(dt[..., None] * A)
    return decay if starts is None else decay.masked_fill_(starts[:, :, None, None], 0.0)


def _states(decay: Tensor, written: Tensor, B: Tensor, initial: Tensor) -> Tensor:
    """The state after each token (B, T, E, N); written (B, T, E) is dt·x. `decay` is used up."""
    states = written[..., None] * B[:, :, None]
    states[:, 0].addcmul_(decay[:, 0], initial)
    return _scan_(decay, states)


def _scan_(decay: Tensor, states: Tensor) -> Tensor:
    """states_t += decay_t · states_{t-1} in place, over (B, T, E, N): chunks side by side, then each from the one
    before. Products of decays only ever shrink, so nothing overflows. `decay` is used up."""
    length = states.shape[1]
    size = min(_CHUNK, length)
    whole = length // size * size
    rows, steps = states[:, :whole].unflatten(1, (-1, size)), decay[:, :whole].unflatten(1, (-1, size))
    for i in range(1, size):
        rows[:, :, i].addcmul_(steps[:, :, i], rows[:, :, i - 1])
        steps[:, :, i].mul_(steps[:, :, i - 1])
    for k in range(1, rows.shape[1]):
        rows[:, k].addcmul_(steps[:, k], rows[:, k - 1, -1:])
    for t in range(whole, length):
        states[:, t].addcmul_(decay[:, t], states[:, t - 1])
    return states


def _backward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    starts: Tensor | None,
    initial: Tensor,
    grad_y: Tensor,
    grad_state: Tensor,
) -> tuple[Tensor, ...]:
    """Gradients of one piece: of x, dt, B, C, A and of the state that enters it; grad_state is of the one it leaves."""
    decay, written = _decay(dt, A, starts), x * dt
    states = _states(decay.clone(), written, B, initial)
    grad_C = torch.matmul(grad_y[:, :, None], states)[:, :, 0]
    # What reaches each state from its own token's output and from the next state, the last token first.
    reaching = (grad_y[..., None] * C[:, :, None]).flip(1)
    reaching[:, 0] += grad_state
    later = torch.cat([torch.zeros_like(decay[:, :1]), decay[:, 1:].flip(1)], dim=1)
    grad = _scan_(later, reaching).flip(1)
    into = torch.matmul(grad, B[..., None])[..., 0]  # of dt·x
    grad_B = torch.matmul(written[:, :, None], grad)[:, :, 0]
    grad_initial = decay[:, 0] * grad[:, 0]
    before = torch.cat([initial[:, None], states[:, :-1]], dim=1)
    rate = before.mul_(grad).mul_(decay)  # of dt·A
    grad_dt = torch.einsum("bten,en->bte", rate, A) + x * into
    grad_A = torch.einsum("bten,bte->en", rate, dt)
    return dt * into, grad_dt, grad_B, grad_C, grad_A, grad_initial
