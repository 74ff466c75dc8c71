"""The two block forms. `HybridBlock` is FusionTree's (SPEC M1); `SequentialBlock` is the usual mixer-then-MLP layer.

Shapes: B batch, L tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fusiontree.models.block import Block, LayerOutput
from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.config import HybridConfig, LayerSpec
from fusiontree.models.fusion import Alignment, CrossFusion, build_gate, fuse
from fusiontree.models.linear import Linear
from fusiontree.models.local_global_attn import LocalGlobalAttention
from fusiontree.models.mamba_block import MambaBlock
from fusiontree.models.mlp import build_mlp
from fusiontree.models.norms import RMSNorm
from fusiontree.models.positions import Positions
from fusiontree.models.segments import Segments
from fusiontree.models.srte import SRTE
from fusiontree.ops.autocast import autocast_dtype

_RMS_STRIDE = 8  # every 8th token serves for the watched branch norms


def build_mixers(config: HybridConfig, spec: LayerSpec) -> nn.ModuleDict:
    """The layer's mixers by name, Mamba first."""
    build = {"mamba": lambda: MambaBlock(config), "attention": lambda: LocalGlobalAttention(config, spec)}
    return nn.ModuleDict({name: build[name]() for name in spec.mixers})


class HybridBlock(Block):
    """Both branches read norm(x) side by side (Mamba with the time encoding added), are aligned and fused by the gate:

    y = x + fusion_proj(g·h_mamba + (1-g)·h_attn) + mlp(a). With `cross_rank` the branches first glance at each other.
    Placement `post` norms y, `sandwich` norms what is added,
    `pre` neither. A pruned block has one mixer; its other branch counts as zero.
    """

    def __init__(self, config: HybridConfig, spec: LayerSpec) -> None:
        super().__init__()
        hidden, eps = config.hidden_size, config.norm_eps
        self.placement = config.norm_placement
        self.norm = RMSNorm(hidden, eps)
        self.mixers = build_mixers(config, spec)
        self.srte = None if config.srte_shared or config.srte == "none" or "mamba" not in spec.mixers else SRTE(config)
        glances = config.cross_rank > 0 and len(spec.mixers) == 2
        self.cross = CrossFusion(config) if glances else None
        self.alignment = Alignment(config, spec.mixers)
        self.gate = build_gate(config)
        self.fusion_proj = Linear(hidden, hidden)
        self.mlp = build_mlp(config)
        self.out_norm = RMSNorm(hidden, eps) if self.placement != "pre" else None

    def run(
        self,
        x: Tensor,
        positions: Positions,
        segments: Segments,
        cache: HybridCacheLayer | None,
        removed: str | None,
        recompute_branches: bool,
        watch: bool,
    ) -> LayerOutput:
        z = self.norm(x)
        if recompute_branches:
            branches = checkpoint(self._branches, z, positions, segments, cache, removed, use_reentrant=False)
        else:
            branches = self._branches(z, positions, segments, cache, removed)
        # A branch that is out neither gives nor gets a glance: as in a layer that was built without it.
        seen = branches if self.cross is None or removed is not None else self.cross(branches)
        a = self.alignment(seen)
        gate = self.gate(a)
        update = self.fusion_proj(fuse(gate, seen))
        if self.mlp is not None:
            update = update + self.mlp(a)
        y = self._join(x, update)
        if not watch or len(branches) < 2:
            return LayerOutput(y)
        return LayerOutput(y, gate, _rms(branches))

    def _branches(
        self, z: Tensor, positions: Positions, segments: Segments, cache: HybridCacheLayer | None, removed: str | None
    ) -> dict[str, Tensor]:
        branches = {}
        for name, mixer in self.mixers.items():
            if name == removed:
                branches[name] = torch.zeros_like(z, dtype=autocast_dtype(z))  # as the other branch's output
            else:
                x = self._with_time(z, positions) if name == "mamba" else z
                branches[name] = mixer(x, positions, segments, cache)
        return branches

    def _with_time(self, z: Tensor, positions: Positions) -> Tensor:
        encoded = positions.srte if self.srte is None else self.srte(positions.ids)
        return z if encoded is None else z + encoded.to(z.dtype)

    def _join(self, x: Tensor, update: Tensor) -> Tensor:
        if self.placement == "sandwich":
            return x + self.out_norm(update)  # type: ignore[misc]
        return x + update if self.out_norm is None else self.out_norm(x + update)


class SequentialBlock(Block):
    """x + mixer(norm(x)), then x + mlp(norm(x)): LLaMA-like with attention, plain Mamba without the MLP."""

    def __init__(self, config: HybridConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.mixers = build_mixers(config, spec)
        self.norm = RMSNorm(config.hidden_size, config.norm_eps)
        self.mlp = build_mlp(config)
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_eps) if self.mlp is not None else None

    def run(
        self,
        x: Tensor,
        positions: Positions,
        segments: Segments,
        cache: HybridCacheLayer | None,
        removed: str | None,
        recompute_branches: bool,
        watch: bool,
    ) -> LayerOutput:
        (mixer,) = self.mixers.values()
        z = self.norm(x)
        if recompute_branches:
            x = x + checkpoint(mixer, z, positions, segments, cache, use_reentrant=False)
        else:
            x = x + mixer(z, positions, segments, cache)
        if self.mlp is not None:
            x = x + self.mlp(self.mlp_norm(x))  # type: ignore[misc]
        return LayerOutput(x)


def build_block(config: HybridConfig, spec: LayerSpec) -> nn.Module:
    """The block that a layer's entry names."""
    return {"hybrid": HybridBlock, "sequential": SequentialBlock}[spec.block](config, spec)


@torch.no_grad()
def _rms(branches: dict[str, Tensor]) -> Tensor:
    sampled = (branches[name][:, ::_RMS_STRIDE].float() for name in ("mamba", "attention"))
    return torch.stack([h.square().mean().sqrt() for h in sampled])
