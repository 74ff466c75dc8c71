"""Channel mixing: plain MLP and gated linear units."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn
from transformers.activations import ACT2FN

from fusiontree.models.config import HybridConfig
from fusiontree.models.experts import MixtureOfExperts, Routing
from fusiontree.models.linear import Linear


class MLP(nn.Module):
    """H → inner → H with one activation."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.act = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act(self.up_proj(x)))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020); gate and up are one product."""

    activation: ClassVar[str] = "silu"

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        self.gate_up_proj = Linear(config.hidden_size, 2 * config.intermediate_size, config.mlp_bias)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, config.mlp_bias)
        self.act = ACT2FN[self.activation]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(self.act(gate) * up)


class GeGLU(SwiGLU):
    """down(gelu(gate(x)) * up(x))."""

    activation: ClassVar[str] = "gelu"


MLPS: dict[str, type[MLP] | type[SwiGLU]] = {"mlp": MLP, "swiglu": SwiGLU, "geglu": GeGLU}


def build_mlp(config: HybridConfig) -> nn.Module | None:
    """The MLP that `config.mlp_type` names, or several as experts; None for none."""
    if config.mlp_type == "none":
        return None
    kind = MLPS[config.mlp_type]
    return MixtureOfExperts(config, kind) if config.num_experts > 1 else kind(config)


def run_mlp(mlp: nn.Module, x: Tensor) -> tuple[Tensor, Routing | None]:
    """What the MLP makes of x (B, L, H), and where a mixture of experts sent its tokens."""
    if isinstance(mlp, MixtureOfExperts):
        made, routing = mlp(x)
        return made, routing
    return mlp(x), None
