"""The Mamba-1 branch: projection to (x, z), causal convolution, x to (dt, B, C), selective scan, gate, projection.

Shapes: B batch, L tokens, D hidden, E inner width, N state, R rank of the steps, K conv width.
Follows Gu & Dao 2023 (arXiv:2312.00752), with the layout of the projections as in mamba-ssm and transformers' Mamba.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.config import HybridConfig
from fusiontree.models.linear import Linear
from fusiontree.models.positions import Positions
from fusiontree.models.segments import Segments
from fusiontree.models.state_mixer import StateMixer, is_step
from fusiontree.ops import causal_conv1d, causal_conv1d_step, selective_scan, selective_scan_step, step_sizes


class Mamba1Block(StateMixer):
    """(B, L, D) → (B, L, D). Every channel decays in every state at a rate of its own."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.inner = config.mamba_inner_size
        low, high = config.mamba_dt_limit
        self.dt_limit = (float(low), float(high))
        self.parts = [config.mamba_rank, config.mamba_d_state, config.mamba_d_state]
        self.in_proj = Linear(config.hidden_size, 2 * self.inner)
        self._build_convolution(config.mamba_channels, config.mamba_d_conv)
        self.x_proj = Linear(self.inner, sum(self.parts))
        self.dt_proj = Linear(config.mamba_rank, self.inner)
        # fp32 also in a model that is built in another dtype.
        self.dt_bias = nn.Parameter(torch.empty(self.inner, dtype=torch.float32))
        self.A_log = nn.Parameter(torch.empty(self.inner, config.mamba_d_state, dtype=torch.float32))
        self.D = nn.Parameter(torch.empty(self.inner, dtype=torch.float32))
        self.out_proj = Linear(self.inner, config.hidden_size)

    def forward(
        self, x: Tensor, positions: Positions, segments: Segments, cache: HybridCacheLayer | None = None
    ) -> Tensor:
        x, z = self.in_proj(x).chunk(2, dim=-1)
        if is_step(x, segments, cache):
            y = self._decode(x, cache)  # type: ignore[arg-type]
        else:
            valid = segments.valid
            y = self._scan(x if valid is None else x * valid[..., None], valid, segments, cache)
        return self.out_proj(y * F.silu(z))

    def _mix(
        self,
        inputs: Tensor,
        beside: Tensor | None,
        starts: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution and scan, padding (B, L) False in `beside`: y (B, L, E) and both new states."""
        x, conv_state = causal_conv1d(inputs, self.conv_weight, self.conv_bias, starts, conv_state)
        dt, b, c = self._selected(x)
        if beside is not None:
            dt = dt * beside[..., None]
        y, ssm_state = selective_scan(x, dt, self._decay(), b, c, self.D.float(), starts, ssm_state)
        return y, conv_state, ssm_state

    def _decode(self, x: Tensor, cache: HybridCacheLayer) -> Tensor:
        conv_state, ssm_state = cache.conv_state, cache.ssm_state
        assert conv_state is not None and ssm_state is not None
        if cache.record_past:
            cache.undo = lambda kept: self._states_after(kept, x, None, None, conv_state, ssm_state)
        mixed, cache.conv_state = causal_conv1d_step(x[:, 0], self.conv_weight, self.conv_bias, conv_state)
        dt, b, c = self._selected(mixed)
        y, cache.ssm_state = selective_scan_step(mixed, dt, self._decay(), b, c, self.D.float(), ssm_state)
        return y[:, None]

    def _selected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (…, E) → steps dt (…, E) in fp32, B and C (…, N)."""
        dt, b, c = self.x_proj(x).split(self.parts, dim=-1)
        return step_sizes(self.dt_proj(dt), self.dt_bias, self.dt_limit), b, c

    def _decay(self) -> Tensor:
        return -torch.exp(self.A_log.float())
