"""How the branches become one: a glance at each other, alignment, and the gate between them.

Every parameter that belongs to one branch sits under that branch's name (the glances, which need both, under `cross`),
so a pruned layer is the full one with those entries left out, and equals it with that branch's output set to zero.
Shapes: B batch, L tokens, H hidden, r gate rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from fusiontree.models.config import HybridConfig
from fusiontree.models.linear import Linear
from fusiontree.models.norms import RMSNorm


class CrossFusion(nn.Module):
    """h_mamba + up(down(h_attn)), and the other way round: each branch glances at the other through a rank of its own.

    `up` starts at zero, so that a layer starts as it would be without."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.to_mamba = LowRank(config.hidden_size, config.cross_rank)
        self.to_attention = LowRank(config.hidden_size, config.cross_rank)

    def forward(self, branches: dict[str, Tensor]) -> dict[str, Tensor]:
        """Both branch outputs (B, L, H), each with its glance at the other as it was."""
        mamba, attention = branches["mamba"], branches["attention"]
        return {"mamba": mamba + self.to_mamba(attention), "attention": attention + self.to_attention(mamba)}


class LowRank(nn.Module):
    """H → rank → H, without bias: of nothing it makes nothing."""

    def __init__(self, hidden: int, rank: int) -> None:
        super().__init__()
        self.down = Linear(hidden, rank)
        self.up = Linear(rank, hidden)

    def forward(self, h: Tensor) -> Tensor:
        return self.up(self.down(h))


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
        inner, residual = total({name: self.inputs[name](h) for name, h in branches.items()}).chunk(2, dim=-1)
        return self.out(self.act(inner)) + residual


class GateLowRank(nn.Module):
    """g = sigmoid(D tanh(U a)); 1 is all Mamba, 0 all attention; starts near 0.5.

    One per channel, per head (a group of H / num_attention_heads neighbouring channels) or per token.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.share = config.hidden_size // config.gates_per_token  # channels that have one gate
        self.U = Linear(config.hidden_size, config.gate_rank)
        self.D = Linear(config.gate_rank, config.gates_per_token)

    def forward(self, a: Tensor) -> Tensor:
        """a (B, L, H) → g (B, L, H), whatever the granularity."""
        gate = torch.sigmoid(self.D(torch.tanh(self.U(a))))
        return gate if self.share == 1 else gate[..., None].expand(*gate.shape, self.share).flatten(-2)


class GateOfLayer(nn.Module):
    """One learned gate for all tokens and channels of a layer; starts at 0.5."""

    def __init__(self) -> None:
        super().__init__()
        self.logit = nn.Parameter(torch.zeros(1))

    def forward(self, a: Tensor) -> Tensor:
        """a (B, L, H) → g (B, L, H), the same number everywhere."""
        return torch.sigmoid(self.logit.float()).to(a.dtype).expand_as(a)


def build_gate(config: HybridConfig) -> nn.Module:
    """The gate that `config.gate_granularity` names."""
    return GateOfLayer() if config.gate_granularity == "layer" else GateLowRank(config)


class SumOfBranches(nn.Module):
    """h_mamba + h_attn, as in Falcon-H1; a branch that is out counts as zero."""

    def __init__(self, config: HybridConfig, branches: tuple[str, ...]) -> None:
        super().__init__()

    def forward(self, branches: dict[str, Tensor]) -> Tensor:
        """Branch outputs (B, L, H) → (B, L, H)."""
        return total(branches)


class MeanOfBranches(nn.Module):
    """Half of norm(h_mamba) + norm(h_attn), as in Hymba; a branch that is out counts as zero."""

    def __init__(self, config: HybridConfig, branches: tuple[str, ...]) -> None:
        super().__init__()
        # RMS norms whatever the others are: of nothing they make nothing.
        self.branch_norms = nn.ModuleDict({name: RMSNorm(config.hidden_size, config.norm_eps) for name in branches})

    def forward(self, branches: dict[str, Tensor]) -> Tensor:
        """Branch outputs (B, L, H) → (B, L, H)."""
        return 0.5 * total({name: self.branch_norms[name](h) for name, h in branches.items()})


JOINTS: dict[str, type[SumOfBranches] | type[MeanOfBranches]] = {"sum": SumOfBranches, "mean": MeanOfBranches}


def build_joint(config: HybridConfig, branches: tuple[str, ...]) -> nn.Module | None:
    """What joins the branches where `config.fusion_rule` is not the gate."""
    return None if config.fusion_rule == "gate" else JOINTS[config.fusion_rule](config, branches)


def total(branches: dict[str, Tensor]) -> Tensor:
    """The sum of the branch outputs."""
    first, *others = branches.values()
    for h in others:
        first = first + h
    return first


def fuse(gate: Tensor, branches: dict[str, Tensor]) -> Tensor:
    """g·h_mamba + (1-g)·h_attn; with one branch left, its own share of that."""
    mamba, attention = branches.get("mamba"), branches.get("attention")
    if mamba is None:
        assert attention is not None
        return attention - gate * attention
    if attention is None:
        return gate * mamba
    return torch.lerp(attention, mamba, gate)
