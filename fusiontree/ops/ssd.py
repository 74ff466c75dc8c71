"""State-space duality (Mamba-2): chunked scan in matrix products, one-token step, and a step-by-step reference.

The recurrence, per batch row and head (Dao & Gu 2024, arXiv:2405.21060, eq. 1 and section 6):

    state_t = exp(dt_t * A) * state_{t-1} + dt_t * x_t B_t^T          state: (P, N)
    y_t     = state_t C_t + D * x_t

Shapes: B batch, L tokens, H heads, P head size, G groups, N state, Q chunk, C chunks.
A token with dt = 0 leaves the state as it is, which is how padding is made transparent.
A token with `starts` true begins a new document: it sees a zero state.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops.autocast import without_autocast

_SCAN_GROUP = 32  # chunks combined by one dense decay matrix; more levels keep the scan linear in length


def ssd_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The recurrence as written, one token after another. Arguments and results as `ssd`."""
    batch, length, heads, head_dim = x.shape
    state = initial_state
    if state is None:
        state = torch.zeros(batch, heads, head_dim, B.shape[-1], dtype=torch.float32, device=x.device)
    outputs = []
    for t in range(length):
        if starts is not None:
            state = state * (~starts[:, t])[:, None, None, None]
        y, state = ssd_step(x[:, t], dt[:, t], A, B[:, t], C[:, t], D, state)
        outputs.append(y)
    return torch.stack(outputs, dim=1), state


@without_autocast
def ssd_step(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """One token: x (B, H, P), dt (B, H), B and C (B, G, N), state (B, H, P, N) fp32 → y (B, H, P), new state."""
    batch, heads, head_dim = x.shape
    per_group = heads // B.shape[1]
    decay = torch.exp(dt * A)[:, :, None, None]
    x32, b32, c32 = x.float(), B.float(), C.float()
    dx = (x32 * dt[:, :, None]).view(batch, -1, per_group, head_dim, 1)
    update = (dx * b32[:, :, None, None, :]).view_as(state)
    state = torch.addcmul(update, state, decay)
    grouped = state.view(batch, B.shape[1], per_group * head_dim, -1)
    y = torch.matmul(grouped, c32[..., None]).view(batch, heads, head_dim)
    if D is not None:
        y = torch.addcmul(y, x32, D[:, None])
    return y.to(x.dtype), state


@without_autocast
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    starts: Tensor | None = None,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """Chunked scan: all tokens at once, in matrix products.

    x (B, L, H, P); dt (B, L, H) fp32, after softplus, 0 at padding; A (H,) fp32, negative; B and C (B, L, G, N);
    D (H,) fp32; starts (B, L) bool; initial_state (B, H, P, N) fp32. Returns y (B, L, H, P) in x's dtype and the
    final state (B, H, P, N) in fp32. Any L ≥ 1.
    """
    batch, length, heads, head_dim = x.shape
    groups, state_size = B.shape[2:]
    per_group = heads // groups
    Q = chunk_size if chunk_size < length else length  # not min(): compiled for any length, this stays a plain number
    n = -(-length // Q)
    dtype = x.dtype

    # Per-chunk log decays, head-major: (B, C, H, Q). Padding tokens get dt = 0: they neither decay nor write.
    dt_h = _chunked(dt, Q, n).transpose(2, 3)
    log_decay = torch.cumsum(dt_h * A[:, None], dim=-1)
    total = log_decay[..., -1]
    visible, from_past, to_end, crosses = _chunk_masks(starts, Q, n, x.device)

    x_h = _chunked(x, Q, n).transpose(2, 3).contiguous()  # (B, C, H, Q, P), copied once for all products
    B_g = _chunked(B, Q, n).transpose(2, 3)  # (B, C, G, Q, N)
    C_g = _chunked(C, Q, n).transpose(2, 3)

    # Within a chunk: an attention-like (Q, Q) score per head (eq. 10's diagonal blocks), D on the diagonal.
    decay = log_decay[..., :, None] - log_decay[..., None, :]
    weights = decay.masked_fill_(~visible, -torch.inf).exp_() * dt_h[..., None, :]
    weights = weights.view(batch, n, groups, per_group, Q, Q)
    scores = torch.matmul(C_g, B_g.transpose(-1, -2))[:, :, :, None]  # (B, C, G, 1, Q, Q)
    if D is None:
        scores = (scores * weights).to(dtype)
    else:
        diagonal = D.view(groups, per_group, 1, 1) * torch.eye(Q, device=x.device)
        scores = torch.addcmul(diagonal, scores, weights).to(dtype)

    # What each chunk adds to the state, then the state that enters each chunk.
    into_state = torch.exp(total[..., None] - log_decay) * dt_h
    if to_end is not None:
        into_state = into_state * to_end
    weighted = (B_g[:, :, :, None] * into_state.view(batch, n, groups, per_group, Q, 1)).to(dtype)
    written = torch.matmul(x_h.transpose(-1, -2), weighted.view(batch, n, heads, Q, state_size)).float()
    entering, final = _scan_chunks(written, total, crosses, initial_state)

    # Earlier chunks reach a token through the entering state. One product serves both parts.
    reads = torch.exp(log_decay)
    if from_past is not None:
        reads = reads * from_past
    reads = (C_g[:, :, :, None] * reads.view(batch, n, groups, per_group, Q, 1)).to(dtype)
    carried = entering.to(dtype, memory_format=torch.contiguous_format).flatten(0, 2)
    y = torch.bmm(reads.reshape(-1, Q, state_size), carried.transpose(1, 2))
    y = torch.baddbmm(y, scores.reshape(-1, Q, Q), x_h.flatten(0, 2)).view(batch, n, heads, Q, head_dim)
    return y.transpose(2, 3).reshape(batch, n * Q, heads, head_dim)[:, :length], final


def _chunked(t: Tensor, Q: int, n: int) -> Tensor:
    """(B, L, …) → (B, C, Q, …), zeros after the end."""
    short = n * Q - t.shape[1]
    if short:
        t = F.pad(t, [0, 0] * (t.ndim - 2) + [0, short])
    return t.reshape(t.shape[0], n, Q, *t.shape[2:])


def _chunk_masks(
    starts: Tensor | None, Q: int, n: int, device: torch.device
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Who may see whom: in the chunk (…, Q, Q); a token the entering state, the leaving state a token (B, C, 1, Q);
    and whether a document starts inside each chunk (B, C), which cuts the state."""
    causal = torch.ones(Q, Q, dtype=torch.bool, device=device).tril()
    if starts is None:
        return causal, None, None, None
    # Documents begun since the chunk's first token, (B, C, 1, Q).
    document = _chunked(starts[..., None], Q, n)[..., 0].cumsum(-1)[:, :, None]
    visible = causal & (document[..., :, None] == document[..., None, :])
    last = document[..., -1:]
    return visible, document == 0, document == last, (last > 0)[:, :, 0, 0]


def _scan_chunks(
    written: Tensor, log_decay: Tensor, crosses: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """States entering each chunk (B, C, H, P, N) and the state after the last (B, H, P, N), all fp32.

    written: what each chunk adds (B, C, H, P, N); log_decay: its total log decay (B, C, H); crosses: a document starts
    in it, so nothing from before survives (B, C).
    """
    batch, n, heads, *cell = written.shape
    if initial is None:
        initial = torch.zeros(batch, heads, *cell, dtype=torch.float32, device=written.device)
    if n > _SCAN_GROUP:
        return _scan_groups(written, log_decay, crosses, initial)
    states = torch.cat([initial[:, :, None].float(), written.transpose(1, 2)], dim=2).flatten(3)  # (B, H, C+1, PN)
    reach = torch.cumsum(F.pad(log_decay, (0, 0, 1, 0)), dim=1).transpose(1, 2)  # (B, H, C+1)
    keep = torch.ones(n + 1, n + 1, dtype=torch.bool, device=written.device).tril()
    if crosses is not None:
        cuts = F.pad(crosses.cumsum(1), (1, 0))[:, None]  # (B, 1, C+1)
        keep = keep & (cuts[..., :, None] == cuts[..., None, :])
    decay = (reach[..., :, None] - reach[..., None, :]).masked_fill(~keep, -torch.inf).exp()
    states = torch.matmul(decay, states).unflatten(3, cell).transpose(1, 2)
    return states[:, :-1], states[:, -1].clone()  # the last one alone: caches keep it


def _scan_groups(written: Tensor, log_decay: Tensor, crosses: Tensor | None, initial: Tensor) -> tuple[Tensor, Tensor]:
    """The same scan over many chunks: groups of `_SCAN_GROUP` at once, then the groups among themselves."""
    batch, n, heads, *cell = written.shape
    size, groups = _SCAN_GROUP, -(-n // _SCAN_GROUP)
    short = groups * size - n
    padded = F.pad(written, [0, 0, 0, 0, 0, 0, 0, short]).view(batch * groups, size, heads, *cell)
    decay = F.pad(log_decay, (0, 0, 0, short)).view(batch, groups, size, heads)
    cut = None if crosses is None else F.pad(crosses, (0, short)).view(batch, groups, size)

    inside, added = _scan_chunks(padded, decay.flatten(0, 1), None if cut is None else cut.flatten(0, 1), None)
    entering_group, final = _scan_chunks(
        added.view(batch, groups, heads, *cell), decay.sum(2), None if cut is None else cut.any(2), initial
    )
    # Exclusive decay from the group's begin to each chunk.
    before = torch.exp(torch.cumsum(decay, dim=2) - decay)
    if cut is not None:
        uncut = (cut.cumsum(2) - cut.long()) == 0
        before = before * uncut[..., None]
    inside = inside.view(batch, groups, size, heads, *cell)
    entering = inside + before[..., None, None] * entering_group[:, :, None]
    return entering.flatten(1, 2)[:, :n], final
