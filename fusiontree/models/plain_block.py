"""The usual blocks: mixer, then MLP; or both side by side. With two mixers, joined by their sum or mean.

Shapes: B batch, L tokens, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fusiontree.models.block import Block, LayerOutput
from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.config import HybridConfig, LayerSpec
from fusiontree.models.fusion import build_joint
from fusiontree.models.mixers import build_mixers
from fusiontree.models.mlp import build_mlp, run_mlp
from fusiontree.models.norms import build_norm
from fusiontree.models.positions import Positions
from fusiontree.models.segments import Segments
from fusiontree.ops.autocast import autocast_dtype


class PlainBlock(Block):
    """What the two have in common: mixers, a norm, an MLP."""

    def __init__(self, config: HybridConfig, spec: LayerSpec) -> None:
        super().__init__()
        self.placement = config.norm_placement
        self.mixers = build_mixers(config, spec)
        self.joint = build_joint(config, spec.mixers)
        self.norm = build_norm(config)
        self.mlp = build_mlp(config)

    def _mixed(
        self,
        z: Tensor,
        positions: Positions,
        segments: Segments,
        cache: HybridCacheLayer | None,
        removed: str | None,
        recompute: bool,
    ) -> Tensor:
        arguments = (z, positions, segments, cache, removed)
        return checkpoint(self._join, *arguments, use_reentrant=False) if recompute else self._join(*arguments)

    def _join(
        self, z: Tensor, positions: Positions, segments: Segments, cache: HybridCacheLayer | None, removed: str | None
    ) -> Tensor:
        branches = {
            name: torch.zeros_like(z, dtype=autocast_dtype(z))
            if name == removed
            else mixer(z, positions, segments, cache)
            for name, mixer in self.mixers.items()
        }
        if self.joint is not None:
            joined: Tensor = self.joint(branches)
            return joined
        (alone,) = branches.values()
        return alone


class SequentialBlock(PlainBlock):
    """x + mixer(norm(x)), then x + mlp(norm(x)): LLaMA-like with attention, plain Mamba without the MLP.

    Placement `post` norms each sum instead (Vaswani et al. 2017), `sandwich` also norms what is added.
    """

    def __init__(self, config: HybridConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        sandwich = self.placement == "sandwich"
        self.mlp_norm = build_norm(config) if self.mlp is not None else None
        self.out_norm = build_norm(config) if sandwich else None
        self.mlp_out_norm = build_norm(config) if sandwich and self.mlp is not None else None

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
        post = self.placement == "post"
        update = self._mixed(x if post else self.norm(x), positions, segments, cache, removed, recompute_branches)
        x = x + (update if self.out_norm is None else self.out_norm(update))
        x = self.norm(x) if post else x
        if self.mlp is None or self.mlp_norm is None:
            return LayerOutput(x)
        update, routing = run_mlp(self.mlp, x if post else self.mlp_norm(x))
        x = x + (update if self.mlp_out_norm is None else self.mlp_out_norm(update))
        return LayerOutput(self.mlp_norm(x) if post else x, routing=routing)


class ParallelBlock(PlainBlock):
    """x + mixer(norm(x)) + mlp(norm(x)), as in Falcon; with `parallel_norms` 2 each has a norm of its own.

    Placement `post` norms the sum instead, `sandwich` also norms what is added.
    """

    def __init__(self, config: HybridConfig, spec: LayerSpec) -> None:
        super().__init__(config, spec)
        self.mlp_norm = build_norm(config) if config.parallel_norms == 2 else None
        self.out_norm = build_norm(config) if self.placement == "sandwich" else None

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
        post = self.placement == "post"
        z = x if post else self.norm(x)
        update = self._mixed(z, positions, segments, cache, removed, recompute_branches)
        beside, routing = run_mlp(self.mlp, z if self.mlp_norm is None else self.mlp_norm(x))  # type: ignore[arg-type]
        update = update + beside
        x = x + (update if self.out_norm is None else self.out_norm(update))
        return LayerOutput(self.norm(x) if post else x, routing=routing)
