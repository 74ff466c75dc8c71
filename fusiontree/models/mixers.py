"""The mixers by name: whatever moves information along time."""

from __future__ import annotations

from torch import nn

from fusiontree.models.config import HybridConfig, LayerSpec
from fusiontree.models.local_global_attn import LocalGlobalAttention
from fusiontree.models.mamba1_block import Mamba1Block
from fusiontree.models.mamba_block import MambaBlock

MAMBAS: dict[str, type[MambaBlock] | type[Mamba1Block]] = {"mamba2": MambaBlock, "mamba1": Mamba1Block}


def build_mixers(config: HybridConfig, spec: LayerSpec) -> nn.ModuleDict:
    """The layer's mixers by name, Mamba first."""
    build = {
        "mamba": lambda: MAMBAS[config.mamba_type](config),
        "attention": lambda: LocalGlobalAttention(config, spec),
    }
    return nn.ModuleDict({name: build[name]() for name in spec.mixers})
