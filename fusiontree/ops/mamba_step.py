"""One token through the Mamba-2 mixer between its two projections: convolution, recurrence, gated group norm.

Shapes: B rows, E inner width, H heads, P head size (E = H·P), G groups, N state, K kernel width, channels = E + 2·G·N.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from fusiontree.ops import native
from fusiontree.ops.causal_conv1d import causal_conv1d_step
from fusiontree.ops.ssd import ssd_step


@dataclass(frozen=True)
class MambaSizes:
    """What the step needs to know besides its tensors."""

    heads: int
    head_dim: int
    state: int
    groups: int
    dt_limit: tuple[float, float]
    eps: float


@dataclass(frozen=True)
class MambaWeights:
    """The mixer's small parameters: (channels, K), (channels,), three of (H,), and the norm's (E,)."""

    conv_weight: Tensor
    conv_bias: Tensor
    dt_bias: Tensor
    A_log: Tensor
    D: Tensor
    norm: Tensor


def mamba_step(
    projected: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaWeights, sizes: MambaSizes
) -> tuple[Tensor, Tensor, Tensor]:
    """projected (B, E + channels + H) = z, xBC, dt; conv_state (B, channels, K-1); ssm_state (B, H, P, N) fp32.

    Returns y (B, E), ready for the output projection, and both new states.
    """
    same = (projected, conv_state, weights.conv_weight, weights.conv_bias, weights.norm)  # in dtype
    # The kernel goes row by row and is bound by the states it moves: unlike a product, it wins at any number of rows.
    kernel = native.kernel("mamba_step", 1, *same)
    if kernel is None or not _fits(projected, conv_state, ssm_state, weights, sizes):
        return mamba_step_reference(projected, conv_state, ssm_state, weights, sizes)
    projected, conv_state, ssm_state = projected.contiguous(), conv_state.contiguous(), ssm_state.contiguous()
    rows, inner, channels = projected.shape[0], sizes.heads * sizes.head_dim, conv_state.shape[1]
    new_conv, new_ssm = torch.empty_like(conv_state), torch.empty_like(ssm_state)
    y, scratch = projected.new_empty(rows, inner), ssm_state.new_empty(rows, channels + inner)
    per_head = [t.float().contiguous() for t in (weights.dt_bias, weights.A_log, weights.D)]
    states = [conv_state, new_conv, ssm_state, new_ssm]
    small = [t.contiguous() for t in (weights.conv_weight, weights.conv_bias)]
    tensors = [projected, *states, *small, *per_head, weights.norm.contiguous(), y, scratch]
    counts = (rows, sizes.heads, sizes.head_dim, sizes.state, sizes.groups, weights.conv_weight.shape[1])
    kernel(*(t.data_ptr() for t in tensors), *counts, *sizes.dt_limit, sizes.eps)
    return y, new_conv, new_ssm


def _fits(projected: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaWeights, sizes: MambaSizes) -> bool:
    """Whether all is of these sizes: the kernel reads by them, whatever it is given, a sharded weight's stub too."""
    rows, inner = projected.shape[0], sizes.heads * sizes.head_dim
    channels, width = inner + 2 * sizes.groups * sizes.state, weights.conv_weight.shape[-1]
    per_head = (weights.dt_bias, weights.A_log, weights.D)
    return (
        weights.conv_weight.shape == (channels, width)
        and weights.conv_bias.shape == (channels,)
        and weights.norm.shape == (inner,)
        and all(t.shape == (sizes.heads,) for t in per_head)
        and projected.shape == (rows, inner + channels + sizes.heads)
        and conv_state.shape == (rows, channels, width - 1)
        and ssm_state.shape == (rows, sizes.heads, sizes.head_dim, sizes.state)
        and ssm_state.dtype == torch.float32
        and ssm_state.device == projected.device
    )


def mamba_step_reference(
    projected: Tensor, conv_state: Tensor, ssm_state: Tensor, weights: MambaWeights, sizes: MambaSizes
) -> tuple[Tensor, Tensor, Tensor]:
    """The same from the ops of its parts."""
    inner, grouped = sizes.heads * sizes.head_dim, sizes.groups * sizes.state
    z, xbc, dt = projected.split([inner, inner + 2 * grouped, sizes.heads], dim=-1)
    mixed, conv_state = causal_conv1d_step(xbc, weights.conv_weight, weights.conv_bias, conv_state)
    x, b, c = mixed.split([inner, grouped, grouped], dim=-1)
    dt = step_sizes(dt, weights.dt_bias, sizes.dt_limit)
    groups = (sizes.groups, sizes.state)
    heads = x.unflatten(-1, (sizes.heads, -1)), dt, -torch.exp(weights.A_log.float())
    y, ssm_state = ssd_step(*heads, b.unflatten(-1, groups), c.unflatten(-1, groups), weights.D.float(), ssm_state)
    return gated_rms_norm(y.flatten(-2), z, weights.norm, sizes.groups, sizes.eps), conv_state, ssm_state


def step_sizes(dt: Tensor, dt_bias: Tensor, limit: tuple[float, float]) -> Tensor:
    """softplus(dt + bias) in fp32, kept within `limit`. dt (…, H)."""
    dt = F.softplus(dt.float() + dt_bias.float())
    return dt if limit == (0.0, float("inf")) else dt.clamp(*limit)


def gated_rms_norm(y: Tensor, z: Tensor, weight: Tensor, groups: int, eps: float) -> Tensor:
    """rmsnorm(y * silu(z)) in groups of channels, Mamba-2's gated output. y and z (…, E)."""
    gated = (y.float() * F.silu(z.float())).unflatten(-1, (groups, -1))
    normed = F.rms_norm(gated, gated.shape[-1:], None, eps).flatten(-2)
    return (normed * weight.float()).to(y.dtype)
