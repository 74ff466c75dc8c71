"""The model: layers as data, mixers side by side, a gate between them, and exact caches."""

from fusiontree.models.accounting import Accounting, account
from fusiontree.models.block import compile_blocks
from fusiontree.models.cache import HybridCache
from fusiontree.models.config import HybridConfig
from fusiontree.models.convert import from_transformers, to_transformers
from fusiontree.models.hybrid_model import HybridLanguageModel, HybridOutput
from fusiontree.models.presets import preset
from fusiontree.models.solve import Solved, solve

__all__ = [
    "Accounting",
    "HybridCache",
    "HybridConfig",
    "HybridLanguageModel",
    "HybridOutput",
    "Solved",
    "account",
    "compile_blocks",
    "from_transformers",
    "preset",
    "solve",
    "to_transformers",
]
