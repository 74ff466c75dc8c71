"""FusionTree's own block form (SPEC M1), and the choice among all of them.

Shapes: B batch, L tokens, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusiontree.models.block import Block, LayerOutput
from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.config import HybridConfig, LayerSpec
from fusiontree.models.fusion import Alignment, CrossFusion, build_gate, build_joint, fuse, total
from fusiontree.models.linear import Linear
from fusiontree.models.mixers import build_mixers
from fusiontree.models.mlp import build_mlp, run_mlp
from fusiontree.models.norms import build_norm
from fusiontree.models.plain_block import ParallelBlock, SequentialBlock
from fusiontree.models.positions import Positions
from fusiontree.models.segments import Segments
from fusiontree.models.srte import SRTE
from fusiontree.ops.autocast import autocast_dtype

_RMS_STRIDE = 8  # every 8th token serves for the watched branch norms


class HybridBlock(Block):
    """Both branches read norm(x) side by side (Mamba with the time encoding added), are aligned and fused by the gate:

    y = x + fusion_proj(g·h_mamba + (1-g)·h_attn) + mlp(a). With `cross_rank` the branches first glance at each other.
    Placement `post` norms y, `sandwich` norms what is added,
    `pre` neither. A pruned block has one mixer; its other branch counts as zero. `fusion_rule` sum or mean stands in
    the gate's place; without `alignment` a is the branches' sum.
    """

    def __init__(self, config: HybridConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.norm = build_norm(config)
        self.mixers = build_mixers(config, spec)
        self.srte = None if config.srte_shared or config.srte == "none" or "mamba" not in spec.mixers else SRTE(config)
        glances = config.cross_rank > 0 and len(spec.mixers) == 2
        self.cross = CrossFusion(config) if glances else None
        self.alignment = Alignment(config, spec.mixers) if config.alignment else None
        self.gate = build_gate(config) if config.fusion_rule == "gate" else None
        self.joint = build_joint(config, spec.mixers)
        self.fusion_proj = Linear(config.hidden_size, config.hidden_size)
        self.mlp = build_mlp(config)
        self.out_norm = build_norm(config) if self.placement != "pre" else None

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
        a = total(seen) if self.alignment is None else self.alignment(seen)
        gate = None if self.gate is None else self.gate(a)
        fused = self.joint(seen) if gate is None else fuse(gate, seen)  # type: ignore[misc]
        update = self.fusion_proj(fused)
        routing = None
        if self.mlp is not None:
            small, routing = run_mlp(self.mlp, a)
            update = update + small
        y = self._join(x, update)
        if not watch or gate is None or len(branches) < 2:
            return LayerOutput(y, routing=routing)
        return LayerOutput(y, gate, _rms(branches), routing)

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


BLOCK_FORMS: dict[str, Callable[[HybridConfig, LayerSpec], Block]] = {
    "hybrid": HybridBlock,
    "sequential": SequentialBlock,
    "parallel": ParallelBlock,
}


def build_block(config: HybridConfig, spec: LayerSpec) -> Block:
    """The block that a layer's entry names."""
    return BLOCK_FORMS[spec.block](config, spec)


@torch.no_grad()
def _rms(branches: dict[str, Tensor]) -> Tensor:
    sampled = (branches[name][:, ::_RMS_STRIDE].float() for name in ("mamba", "attention"))
    return torch.stack([h.square().mean().sqrt() for h in sampled])
