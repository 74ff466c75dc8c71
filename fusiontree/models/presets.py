"""Named configurations: FusionTree and its two parents, as data for the one model class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from fusiontree.errors import ConfigError
from fusiontree.models.config import HybridConfig

Settings = dict[str, Any]


def _fusiontree(settings: Settings) -> Settings:
    """Mamba and attention side by side in every layer, fused by the gate; `HybridConfig`'s own defaults."""
    return {}


def _llama(settings: Settings) -> Settings:
    """A LLaMA-like transformer: pre-norm, RoPE, all heads global, SwiGLU of 8/3·H. With `sliding_window`, Mistral's."""
    hidden = settings.get("hidden_size", HybridConfig.hidden_size)
    inner = -(-8 * hidden // 3) if isinstance(hidden, int) else 0  # a wrong type is refused by the config itself
    return {
        "sliding_window": None,
        "global_heads": 0,
        "mlp_type": "swiglu",
        "hidden_act": "silu",
        "intermediate_size": -(-inner // 8) * 8,
        "layers": _sequential("attention", settings),
        **_PRE_NORM,
    }


def _mamba2(settings: Settings) -> Settings:
    """A pure Mamba-2: pre-norm, no MLP, state 128 as in Dao & Gu 2024."""
    return {"mlp_type": "none", "mamba_d_state": 128, "layers": _sequential("mamba", settings), **_PRE_NORM}


_PRE_NORM: Settings = {"norm_placement": "pre", "norm_eps": 1e-5, "srte": "none"}
PRESETS: dict[str, Callable[[Settings], Settings]] = {"fusiontree": _fusiontree, "llama": _llama, "mamba2": _mamba2}


def preset(name: str, **overrides: Any) -> HybridConfig:
    """The named configuration with any `HybridConfig` setting replaced; ConfigError for an unknown name or setting."""
    if name not in PRESETS:
        raise ConfigError(f"preset {name!r} does not exist; there are {', '.join(PRESETS)}")
    known = [field.name for field in fields(HybridConfig)]
    for key in overrides:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            raise ConfigError(
                f"preset {name!r}: unknown setting {key!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )
    return HybridConfig(**{**PRESETS[name](overrides), **overrides})


def _sequential(mixer: str, settings: Settings) -> list[dict[str, Any]]:
    count = settings.get("num_hidden_layers", HybridConfig.num_hidden_layers)
    return [{"block": "sequential", "mixers": [mixer]} for _ in range(count if isinstance(count, int) else 0)]
