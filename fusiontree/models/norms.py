"""Normalisation, in fp32 inside."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusiontree.models.config import HybridConfig
from fusiontree.ops import gated_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension (Zhang & Sennrich 2019), in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """(x - mean(x)) / std(x) * weight + bias over the last dimension (Ba et al. 2016), in x's dtype."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x.float(), self.weight.shape, self.weight.float(), self.bias.float(), self.eps).to(x.dtype)


NORMS: dict[str, type[RMSNorm] | type[LayerNorm]] = {"rms": RMSNorm, "layer": LayerNorm}


def build_norm(config: HybridConfig) -> nn.Module:
    """The norm over the hidden size that `config.norm_type` names."""
    return NORMS[config.norm_type](config.hidden_size, config.norm_eps)


class GatedRMSNorm(nn.Module):
    """rmsnorm(y * silu(z)) in `groups` groups of channels, Mamba-2's gated output."""

    def __init__(self, size: int, groups: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.groups = groups
        self.eps = eps

    def forward(self, y: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(y, z, self.weight, self.groups, self.eps)
