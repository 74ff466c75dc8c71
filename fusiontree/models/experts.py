"""A mixture of experts in the MLP's place: each token goes to the few that its router likes best.

Shapes: B batch, L tokens, H hidden, E experts, k experts per token.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fusiontree.models.config import HybridConfig
from fusiontree.models.linear import Linear


class Routing(NamedTuple):
    """How tokens were sent."""

    probabilities: Tensor  # (B, L, E) fp32, with gradient
    chosen: Tensor  # (B, L, k) indices of experts


class MixtureOfExperts(nn.Module):
    """Σ w_e expert_e(x) over the k most probable experts; w are their probabilities, made to sum to 1 (k = 1: as it is,
    Fedus et al. 2021, or the router would learn nothing from the text)."""

    def __init__(self, config: HybridConfig, build: Callable[[HybridConfig], nn.Module]) -> None:
        super().__init__()
        self.per_token = config.experts_per_token
        self.router = Linear(config.hidden_size, config.num_experts)
        self.experts = nn.ModuleList(build(config) for _ in range(config.num_experts))

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x (B, L, H) → the same shape, and where its tokens went."""
        probabilities = self.router(x).float().softmax(-1)
        weights, chosen = probabilities.topk(self.per_token, dim=-1)
        if self.per_token > 1:
            weights = weights / weights.sum(-1, keepdim=True)
        # Sizes that depend on values would break a compiled block in two.
        compute = self._everywhere if torch.compiler.is_compiling() else self._sent
        return compute(x, weights, chosen), Routing(probabilities, chosen)

    def _sent(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Tokens sorted by expert, one product for each. Every expert is called, also with no token: engines that bring
        parameters together module by module must do so alike in all processes, and no gradient is missing."""
        flat, experts = x.flatten(0, 1), chosen.flatten()
        order = experts.argsort(stable=True)
        token = order // self.per_token
        counts = torch.bincount(experts, minlength=len(self.experts)).tolist()
        parts = flat[token].split(counts)
        done = torch.cat([expert(part) for expert, part in zip(self.experts, parts, strict=True)])
        done = done * weights.flatten()[order, None].to(done.dtype)
        return done.new_zeros(flat.shape).index_add(0, token, done).view_as(x)

    def _everywhere(self, x: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Every expert for every token, and zero as the weight of those not chosen."""
        share = torch.zeros(*x.shape[:2], len(self.experts), device=x.device).scatter(-1, chosen, weights)
        total = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            done = expert(x)
            total = total + done * share[..., i : i + 1].to(done.dtype)
        return total
