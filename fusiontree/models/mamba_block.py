"""The Mamba-2 branch: projection to (z, x, B, C, dt), causal convolution, chunked scan, gated norm, output projection.

Shapes: B batch, L tokens, D hidden, E inner width, H heads, P head size (E = H·P), G groups, N state, K conv width.
Follows Dao & Gu 2024 (arXiv:2405.21060), with the layout of the projections as in mamba-ssm and transformers' Mamba2.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.config import HybridConfig
from fusiontree.models.linear import Linear
from fusiontree.models.norms import GatedRMSNorm
from fusiontree.models.positions import Positions
from fusiontree.models.segments import Segments
from fusiontree.models.state_mixer import StateMixer, is_step
from fusiontree.ops import MambaSizes, MambaWeights, causal_conv1d, mamba_step, ssd, step_sizes


class MambaBlock(StateMixer):
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
        self.channels = config.mamba_channels
        self.in_proj = Linear(config.hidden_size, self.inner + self.channels + self.heads)
        self._build_convolution(self.channels, config.mamba_d_conv)
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
        if is_step(x, segments, cache):
            return self.out_proj(self._decode(projected[:, 0], cache)[:, None])  # type: ignore[arg-type]
        z, xbc, dt = self._split_projected(projected)
        dt = step_sizes(dt, self.dt_bias, self.sizes.dt_limit)
        if segments.valid is not None:
            xbc, dt = xbc * segments.valid[..., None], dt * segments.valid[..., None]
        return self.out_proj(self.norm(self._scan(xbc, dt, segments, cache).flatten(-2), z))

    def _split_projected(self, projected: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z, xbc, dt = projected.split([self.inner, self.channels, self.heads], dim=-1)
        return z, xbc, dt

    def _mix(
        self,
        inputs: Tensor,
        beside: Tensor | None,
        starts: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution of xBC and scan in steps dt (B, L, H): y (B, L, H, P) and both new states."""
        assert beside is not None
        mixed, conv_state = causal_conv1d(inputs, self.conv_weight, self.conv_bias, starts, conv_state)
        x, b, c = self._split_heads(mixed)
        y, ssm_state = ssd(x, beside, self._decay(), b, c, self.D.float(), starts, ssm_state, self.chunk_size)
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

    def _decay(self) -> Tensor:
        return -torch.exp(self.A_log.float())

    def _split_heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(…, channels) → x (…, H, P), B and C (…, G, N)."""
        x, b, c = mixed.split([self.inner, self.groups * self.state_size, self.groups * self.state_size], dim=-1)
        grouped = (self.groups, self.state_size)
        return x.unflatten(-1, (self.heads, -1)), b.unflatten(-1, grouped), c.unflatten(-1, grouped)
