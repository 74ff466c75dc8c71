"""The Mamba-2 branch: projection to (z, x, B, C, dt), causal convolution, chunked scan, gated norm, output projection.

Shapes: B batch, L tokens, D hidden, E inner width, H heads, P head size (E = H·P), G groups, N state, K conv width.
Follows Dao & Gu 2024 (arXiv:2405.21060), with the layout of the projections as in mamba-ssm and transformers' Mamba2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.config import HybridConfig
from fusiontree.models.kv_buffer import insert_past
from fusiontree.models.linear import Linear
from fusiontree.models.norms import GatedRMSNorm
from fusiontree.models.positions import Positions
from fusiontree.models.segments import Segments
from fusiontree.ops import MambaSizes, MambaWeights, causal_conv1d, mamba_step, ssd, step_sizes


class MambaBlock(nn.Module):
    """(B, L, D) → (B, L, D). State: the last K-1 inputs of the convolution and the SSM state in fp32."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.inner = config.mamba_inner_size
        self.heads = config.mamba_num_heads
        self.groups = config.mamba_n_groups
        self.state_size = config.mamba_d_state
        self.chunk_size = config.mamba_chunk_size
        low, high = config.mamba_dt_limit
        self.sizes = MambaSizes(
            self.heads, config.mamba_head_dim, self.state_size, self.groups, (float(low), float(high)), config.norm_eps
        )
        self.channels = self.inner + 2 * self.groups * self.state_size
        self.in_proj = Linear(config.hidden_size, self.inner + self.channels + self.heads)
        self.conv_weight = nn.Parameter(torch.empty(self.channels, config.mamba_d_conv))
        self.conv_bias = nn.Parameter(torch.empty(self.channels))
        # fp32 also in a model that is built in another dtype.
        self.dt_bias, self.A_log, self.D = (
            nn.Parameter(torch.empty(self.heads, dtype=torch.float32)) for _ in range(3)
        )
        self.norm = GatedRMSNorm(self.inner, self.groups, config.norm_eps)
        self.out_proj = Linear(self.inner, config.hidden_size)

    def forward(
        self, x: Tensor, positions: Positions, segments: Segments, cache: HybridCacheLayer | None = None
    ) -> Tensor:
        projected = self.in_proj(x)
        if _is_step(x, segments, cache):
            return self.out_proj(self._decode(projected[:, 0], cache)[:, None])  # type: ignore[arg-type]
        z, xbc, dt = self._split_projected(projected)
        dt = step_sizes(dt, self.dt_bias, self.sizes.dt_limit)
        if segments.valid is not None:
            xbc, dt = xbc * segments.valid[..., None], dt * segments.valid[..., None]
        return self.out_proj(self.norm(self._scan(xbc, dt, segments, cache).flatten(-2), z))

    def _split_projected(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xbc, dt = projected.split([self.inner, self.channels, self.heads], dim=-1)
        return z, xbc, dt

    def _scan(self, xbc: Tensor, dt: Tensor, segments: Segments, cache: HybridCacheLayer | None) -> Tensor:
        conv_state = ssm_state = None
        starts = segments.starts
        if cache is not None and cache.ssm_state is not None:
            conv_state, ssm_state = cache.conv_state, cache.ssm_state
            if segments.pads is not None:
                # Each row's state goes right before its first real token; the columns it displaces are padding.
                joined = insert_past(conv_state.transpose(1, 2), xbc, segments.pads)  # type: ignore[union-attr]
                size = joined.shape[1] - xbc.shape[1]
                conv_state, xbc = joined[:, :size].transpose(1, 2), joined[:, size:]
        y, new_conv, new_ssm = self._mix(xbc, dt, starts, conv_state, ssm_state)
        if cache is not None:
            if cache.record_past:
                cache.undo = lambda kept: self._states_after(kept, xbc, dt, starts, conv_state, ssm_state)
            cache.conv_state, cache.ssm_state = new_conv, new_ssm
        return y

    def _mix(
        self,
        xbc: Tensor,
        dt: Tensor,
        starts: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution and scan over all tokens: y (B, L, H, P) and both new states."""
        mixed, conv_state = causal_conv1d(xbc, self.conv_weight, self.conv_bias, starts, conv_state)
        x, b, c = self._split_heads(mixed)
        y, ssm_state = ssd(x, dt, self._decay(), b, c, self.D.float(), starts, ssm_state, self.chunk_size)
        return y, conv_state, ssm_state

    def _decode(self, projected: Tensor, cache: HybridCacheLayer) -> Tensor:
        conv_state, ssm_state = cache.conv_state, cache.ssm_state
        assert conv_state is not None and ssm_state is not None
        if cache.record_past:
            _, xbc, dt = self._split_projected(projected[:, None])
            dt = step_sizes(dt, self.dt_bias, self.sizes.dt_limit)
            cache.undo = lambda kept: self._states_after(kept, xbc, dt, None, conv_state, ssm_state)
        weights = MambaWeights(self.conv_weight, self.conv_bias, self.dt_bias, self.A_log, self.D, self.norm.weight)
        y, cache.conv_state, cache.ssm_state = mamba_step(projected, conv_state, ssm_state, weights, self.sizes)
        return y

    def _states_after(
        self,
        kept: int,
        xbc: Tensor,
        dt: Tensor,
        starts: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Both states had only the first `kept` tokens of the last forward come."""
        if kept == 0:
            return conv_state, ssm_state
        starts = None if starts is None else starts[:, :kept]
        return self._mix(xbc[:, :kept], dt[:, :kept], starts, conv_state, ssm_state)[1:]

    def _decay(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def _split_heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, channels) → x (…, H, P), B and C (…, G, N)."""
        x, b, c = mixed.split([self.inner, self.groups * self.state_size, self.groups * self.state_size], dim=-1)
        grouped = (self.groups, self.state_size)
        return x.unflatten(-1, (self.heads, -1)), b.unflatten(-1, grouped), c.unflatten(-1, grouped)


def _is_step(x: Tensor, segments: Segments, cache: HybridCacheLayer | None) -> bool:
    warm = cache is not None and cache.ssm_state is not None
    return warm and x.shape[1] == 1 and segments.valid is None and segments.starts is None
