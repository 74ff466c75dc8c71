"""How the branches become one: alignment, and the low-rank gate between them.

Every parameter that belongs to one branch sits under that branch's name, so a pruned layer is the full one with those
entries left out, and equals it with that branch's output set to zero. Shapes: B batch, L tokens, H hidden, r gate rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fusiontree.models.config import HybridConfig
from fusiontree.models.linear import Linear


class Alignment(nn.Module):
    """a = W_2 act(W_1 [h_mamba; h_attn]) + R [h_mamba; h_attn], as SPEC M1; W_1 and R are one product per branch."""

    def __init__(self, config: HybridConfig, branches: tuple[str, ...]) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.inputs = nn.ModuleDict({name: Linear(hidden, 2 * hidden) for name in branches})
        self.out = Linear(hidden, hidden)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, branches: dict[str, Tensor]) -> Tensor:
        """Branch outputs (B, L, H) → a (B, L, H)."""
        total: Tensor | None = None
        for name, h in branches.items():
            part = self.inputs[name](h)
            total = part if total is None else total + part
        inner, residual = total.chunk(2, dim=-1)  # type: ignore[union-attr]
        return self.out(self.act(inner)) + residual


class GateLowRank(nn.Module):
    """g = sigmoid(D tanh(U a)), per channel; 1 is all Mamba, 0 all attention; starts near 0.5."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.U = Linear(config.hidden_size, config.gate_rank)
        self.D = Linear(config.gate_rank, config.hidden_size)

    def forward(self, a: Tensor) -> Tensor:
        return torch.sigmoid(self.D(torch.tanh(self.U(a))))


def fuse(gate: Tensor, branches: dict[str, Tensor]) -> Tensor:
    """g·h_mamba + (1-g)·h_attn; with one branch left, its own share of that."""
    mamba, attention = branches.get("mamba"), branches.get("attention")
    if mamba is None:
        assert attention is not None
        return attention - gate * attention
    if attention is None:
        return gate * mamba
    return torch.lerp(attention, mamba, gate)
