"""Named configurations: FusionTree with its variants and its parents, as data for the one model class.

A preset is what differs from `HybridConfig`'s defaults, made from the settings that are asked for beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from difflib import get_close_matches
from typing import Any

from fusiontree.errors import ConfigError
from fusiontree.models.config import HybridConfig

Settings = dict[str, Any]
_PRE_NORM: Settings = {"norm_placement": "pre", "norm_eps": 1e-5, "srte": "none"}
_TRANSFORMER: Settings = {
    "block": "sequential", "mixers": ["attention"], "sliding_window": None, "global_heads": 0, **_PRE_NORM,
}  # fmt: skip


def _fusiontree(settings: Settings) -> Settings:
    """V1: Mamba and attention side by side in every layer, fused by the gate; `HybridConfig`'s own defaults."""
    return {}


def _pyramid(settings: Settings) -> Settings:
    """V2: the window grows with depth, to four times its first width."""
    return {"window_growth": 4}


def _cross(settings: Settings) -> Settings:
    """V3: each branch glances at the other through a sixteenth of the width, 64 at most."""
    return {"cross_rank": max(1, min(64, _hidden(settings) // 16))}


def _per_head(settings: Settings) -> Settings:
    """V4: a gate per head in place of one per channel."""
    return {"gate_granularity": "head"}


def _llama(settings: Settings) -> Settings:
    """LLaMA (Touvron et al. 2023): pre-norm, RoPE, all heads global, SwiGLU of 8/3·H."""
    return {**_TRANSFORMER, "mlp_type": "swiglu", "hidden_act": "silu", "intermediate_size": _two_thirds(settings)}


def _mistral(settings: Settings) -> Settings:
    """Mistral (Jiang et al. 2023): LLaMA with a window of 4096 and a key head for up to four query heads."""
    return {**_llama(settings), "sliding_window": 4096, "num_key_value_heads": _key_heads(settings)}


def _gpt2(settings: Settings) -> Settings:
    """GPT-2 (Radford et al. 2019): learned positions, LayerNorm, biases, GELU of 4·H."""
    return {**_classic(settings), "position_encoding": "learned"}


def _bloom(settings: Settings) -> Settings:
    """BLOOM (Le Scao et al. 2022): GPT-2 with ALiBi in place of the table, and a norm on the embeddings."""
    return {**_classic(settings), "position_encoding": "alibi", "embedding_norm": True}


def _falcon(settings: Settings) -> Settings:
    """Falcon-7B (Almazrouei et al. 2023): attention and MLP side by side on one LayerNorm, one key head, no biases."""
    sizes = {"num_key_value_heads": 1, "intermediate_size": 4 * _hidden(settings)}
    return {**_TRANSFORMER, "block": "parallel", "norm_type": "layer", "hidden_act": "gelu", **sizes}


def _classic(settings: Settings) -> Settings:
    biases = {"attention_bias": True, "mlp_bias": True}
    inner = {"intermediate_size": 4 * _hidden(settings), "hidden_act": "gelu_pytorch_tanh"}
    return {**_TRANSFORMER, "norm_type": "layer", **biases, **inner}


def _falcon_h1(settings: Settings) -> Settings:
    """After Falcon-H1 (2025): both mixers read one norm, their outputs are added, then a SwiGLU."""
    return {**_llama(settings), "mixers": ["mamba", "attention"], "fusion_rule": "sum", "mamba_d_state": 128}


def _hymba(settings: Settings) -> Settings:
    """After Hymba (Dong et al. 2024): the mean of both mixers' normed outputs, then a SwiGLU; windows of 1024 but in
    the first, the middle and the last layer. The state-space branch is Mamba-2's."""
    count = _whole(settings, "num_hidden_layers")
    wide = {0, count // 2, count - 1}
    both = {"mixers": ["mamba", "attention"], "fusion_rule": "mean", "sliding_window": 1024}
    layers = [{"sliding_window": None} if i in wide else {} for i in range(count)]
    return {**_llama(settings), **both, "layers": layers}


def _mamba(settings: Settings) -> Settings:
    """A pure Mamba-1 (Gu & Dao 2023): pre-norm, no MLP, state 16."""
    return {**_mamba2(settings), "mamba_type": "mamba1", "mamba_d_state": 16}


def _mamba2(settings: Settings) -> Settings:
    """A pure Mamba-2: pre-norm, no MLP, state 128 as in Dao & Gu 2024."""
    return {"block": "sequential", "mixers": ["mamba"], "mlp_type": "none", "mamba_d_state": 128, **_PRE_NORM}


PRESETS: dict[str, Callable[[Settings], Settings]] = {
    "fusiontree": _fusiontree,
    "fusiontree_v2": _pyramid,
    "fusiontree_v3": _cross,
    "fusiontree_v4": _per_head,
    "gpt2": _gpt2,
    "llama": _llama,
    "mistral": _mistral,
    "bloom": _bloom,
    "falcon": _falcon,
    "falcon_h1_like": _falcon_h1,
    "hymba_like": _hymba,
    "mamba": _mamba,
    "mamba2": _mamba2,
}


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


def _whole(settings: Settings, name: str) -> int:
    """A size that is asked for, or the default; 0 for a wrong type, which the config itself refuses."""
    value = settings.get(name, getattr(HybridConfig, name))
    return value if isinstance(value, int) else 0


def _hidden(settings: Settings) -> int:
    return _whole(settings, "hidden_size")


def _key_heads(settings: Settings) -> int:
    """A quarter of the heads where they are so many, or the most below that divide them."""
    heads = max(1, _whole(settings, "num_attention_heads"))
    return next(count for count in range(max(1, heads // 4), 0, -1) if heads % count == 0)


def _two_thirds(settings: Settings) -> int:
    """A GLU's inner size with as many weights as an MLP of 4·H has: 8/3·H, rounded up to a multiple of 8."""
    return -(-8 * _hidden(settings) // 24) * 8
