"""FusionTree: parallel-hybrid language models. Train, watch the gates, prune, export, generate."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fusiontree.deploy import InferenceRuntime, export_pruned_model
    from fusiontree.models import HybridCache, HybridConfig, HybridLanguageModel, HybridOutput

__version__ = "0.1.0"

_HOMES = {
    "HybridCache": "fusiontree.models",
    "HybridConfig": "fusiontree.models",
    "HybridLanguageModel": "fusiontree.models",
    "HybridOutput": "fusiontree.models",
    "InferenceRuntime": "fusiontree.deploy",
    "export_pruned_model": "fusiontree.deploy",
}
__all__ = [
    "HybridCache",
    "HybridConfig",
    "HybridLanguageModel",
    "HybridOutput",
    "InferenceRuntime",
    "__version__",
    "export_pruned_model",
]


def __getattr__(name: str) -> Any:
    # Loaded on first use: `fusiontree --help` must not wait for torch.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'fusiontree' has no attribute {name!r}")
