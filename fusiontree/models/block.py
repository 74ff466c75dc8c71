"""What every block has in common: its call, its output, and how it is compiled.

Positions, masks and all else that depends on values is made before the blocks run, so that a block is one graph without
breaks, and all layers of a kind share one compiled program. Shapes: B batch, L tokens, H hidden.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fusiontree.models.cache import HybridCacheLayer
from fusiontree.models.experts import Routing
from fusiontree.models.positions import Positions
from fusiontree.models.segments import Segments

# Programs of one kind of block at most: windows, dropped branches, lengths. torch's own limit of 8 would be an error.
_MOST_PROGRAMS = 256


class LayerOutput(NamedTuple):
    """What a block hands on: hidden states (B, L, H), and what is watched when asked for. A tuple, into which engines
    that hook a module's outputs can see."""

    hidden: Tensor
    gate: Tensor | None = None  # (B, L, H), with gradient
    branch_rms: Tensor | None = None  # (2,) fp32: Mamba, attention
    routing: Routing | None = None  # of a mixture of experts, always


class Block(nn.Module):
    """One layer. Subclasses define `run`."""

    compiled: str | None = None  # torch.compile's backend, set by `compile_blocks`

    def forward(
        self,
        x: Tensor,
        positions: Positions,
        segments: Segments,
        cache: HybridCacheLayer | None = None,
        removed: str | None = None,
        recompute_branches: bool = False,
        watch: bool = False,
    ) -> LayerOutput:
        """`removed`: a branch whose output counts as zero; `recompute_branches`: selective checkpointing."""
        if self.compiled is None or not self.training or cache is not None:
            return self.run(x, positions, segments, cache, removed, recompute_branches, watch)
        # Always watched: one program instead of two, and what is watched is at hand anyway.
        program = _program(type(self).run, self.compiled)
        out = program(self, x, positions, segments, None, removed, recompute_branches, True)
        return out if watch else LayerOutput(out.hidden, routing=out.routing)

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
        """`forward`, as Python runs it."""
        raise NotImplementedError


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """From now on `model`, or the one inside a wrapper, trains through torch.compile; evaluation and decoding do not.

    Compiled at the first training step, once for all layers of a kind; a second length is compiled for any length.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _MOST_PROGRAMS)
    limits.accumulated_recompile_limit = max(limits.accumulated_recompile_limit, 4 * _MOST_PROGRAMS)
    for block in model.modules():
        if isinstance(block, Block):
            block.compiled = backend


@functools.cache
def _program(run: Callable[..., LayerOutput], backend: str) -> Callable[..., Any]:
    """One for a kind of block, with the block as its argument: layers that are alike share what is compiled."""
    return torch.compile(run, fullgraph=True, backend=backend)
