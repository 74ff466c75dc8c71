"""What both Mamba branches share: a causal convolution and a scan, whose states a cache carries, exactly.

Shapes: B batch, L tokens, C channels of the convolution, K its width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.kv_buffer import insert_past
from fusiontree.models.segments import Segments


class StateMixer(nn.Module):
    """State: the last K-1 inputs of the convolution and the scan's state in fp32. Subclasses define `_mix`."""

    conv_weight: nn.Parameter
    conv_bias: nn.Parameter

    def _build_convolution(self, channels: int, width: int) -> None:
        self.conv_weight = nn.Parameter(torch.empty(channels, width))
        self.conv_bias = nn.Parameter(torch.empty(channels))

    def _mix(
        self,
        inputs: Tensor,
        beside: Tensor | None,
        starts: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Convolution of `inputs` (B, L, C) and scan, with what else each token needs, (B, L, …), `beside`: y and both
        new states."""
        raise NotImplementedError

    def _scan(
        self, inputs: Tensor, beside: Tensor | None, segments: Segments, cache: HybridCacheLayer | None
    ) -> Tensor:
        conv_state = ssm_state = None
        starts = segments.starts
        if cache is not None and cache.ssm_state is not None:
            conv_state, ssm_state = cache.conv_state, cache.ssm_state
            if segments.pads is not None:
                # Each row's state goes right before its first real token; the columns it displaces are padding.
                joined = insert_past(conv_state.transpose(1, 2), inputs, segments.pads)  # type: ignore[union-attr]
                size = joined.shape[1] - inputs.shape[1]
                conv_state, inputs = joined[:, :size].transpose(1, 2), joined[:, size:]
        y, new_conv, new_ssm = self._mix(inputs, beside, starts, conv_state, ssm_state)
        if cache is not None:
            if cache.record_past:
                cache.undo = lambda kept: self._states_after(kept, inputs, beside, starts, conv_state, ssm_state)
            cache.conv_state, cache.ssm_state = new_conv, new_ssm
        return y

    def _states_after(
        self,
        kept: int,
        inputs: Tensor,
        beside: Tensor | None,
        starts: Tensor | None,
        conv_state: Tensor | None,
        ssm_state: Tensor | None,
    ) -> tuple[Any, Any]:
        """Both states had only the first `kept` tokens of the last forward come."""
        if kept == 0:
            return conv_state, ssm_state
        beside, starts = (None if t is None else t[:, :kept] for t in (beside, starts))
        return self._mix(inputs[:, :kept], beside, starts, conv_state, ssm_state)[1:]


def is_step(x: Tensor, segments: Segments, cache: HybridCacheLayer | None) -> bool:
    """Whether x (B, L, …) is one token of every row after others, and nothing else is to be heeded."""
    warm = cache is not None and cache.ssm_state is not None
    return warm and x.shape[1] == 1 and segments.valid is None and segments.starts is None
