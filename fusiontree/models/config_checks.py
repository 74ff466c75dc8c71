"""What settings of a `HybridConfig` may be: each mistake is one line with the field, the value and what is allowed."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from fusiontree.errors import ConfigError

if TYPE_CHECKING:
    from fusiontree.models.config import HybridConfig

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "position_encoding": ("rope", "alibi", "learned", "none"),
    "global_position_encoding": ("rope", "alibi", "none", None),
    "mamba_type": ("mamba2", "mamba1"),
    "fusion_rule": ("gate", "sum", "mean"),
    "norm_type": ("rms", "layer"),
    "norm_placement": ("post", "pre", "sandwich"),
    "rope_scaling": ("none", "linear", "ntk", "yarn"),
    "srte": ("sincos", "learned", "low_rank", "none"),
    "mlp_type": ("mlp", "swiglu", "geglu", "none"),
    "hidden_act": ("gelu", "gelu_pytorch_tanh", "silu", "relu"),
    "gate_granularity": ("channel", "head", "token", "layer"),
    "checkpointing": ("branches", "block"),
}
_WHOLE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "mamba_d_state", "mamba_d_conv", "mamba_head_dim", "mamba_n_groups", "mamba_chunk_size",
    "srte_rank", "gate_rank", "intermediate_size", "num_experts", "experts_per_token",
)  # fmt: skip
_POSITIVE = ("rope_theta", "rope_factor", "mamba_expand", "norm_eps")
_OR_NONE = ("rope_original_length", "mamba_dt_rank")
_SWITCHES = (
    "srte_shared", "tie_word_embeddings", "use_cache", "alignment", "attention_bias", "mlp_bias", "embedding_norm",
)  # fmt: skip


def require_divides(what: str, value: Any, of_what: str, of: Any) -> None:
    if value < 1 or of % value:
        raise ConfigError(f"{what}={value}: must divide {of_what}={of}")


def check_sizes(config: HybridConfig, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if not is_whole(value) or value < 1:
            raise ConfigError(f"{name}={value!r}: must be a positive whole number")


def check_values(config: HybridConfig) -> None:
    check_sizes(config, _WHOLE)
    check_sizes(config, [name for name in _OR_NONE if getattr(config, name) is not None])
    for name in _POSITIVE:
        if not _is_number(getattr(config, name)) or getattr(config, name) <= 0:
            raise ConfigError(f"{name}={getattr(config, name)!r}: must be a positive number")
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name}={getattr(config, name)!r}: must be one of {', '.join(map(str, allowed))}")
    for name in _SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name}={getattr(config, name)!r}: must be true or false")
    if config.experts_per_token > config.num_experts:
        raise ConfigError(
            f"experts_per_token={config.experts_per_token}: must be between 1 and num_experts={config.num_experts}"
        )
    if config.parallel_norms not in (1, 2) or isinstance(config.parallel_norms, bool):
        raise ConfigError(f"parallel_norms={config.parallel_norms!r}: must be 1 or 2")
    if not is_whole(config.cross_rank) or config.cross_rank < 0:
        raise ConfigError(f"cross_rank={config.cross_rank!r}: must be a whole number ≥ 0, 0 for no glance")
    _check_growth(config)
    drop, spread, limits = config.drop_branch_prob, config.initializer_range, config.mamba_dt_limit
    if not _is_number(drop) or not 0.0 <= drop < 1.0:
        raise ConfigError(f"drop_branch_prob={drop!r}: must be at least 0 and below 1")
    if not _is_number(spread) or spread < 0:
        raise ConfigError(f"initializer_range={spread!r}: must be a number ≥ 0")
    if not isinstance(limits, (list, tuple)) or len(limits) != 2 or not _is_range(*limits):
        raise ConfigError(f"mamba_dt_limit={limits!r}: must be two numbers, 0 ≤ smallest ≤ largest")


def _check_growth(config: HybridConfig) -> None:
    growth = config.window_growth
    if not is_whole(growth) or growth < 1 or growth & (growth - 1):
        raise ConfigError(f"window_growth={growth!r}: must be a power of two: 1, 2, 4, …")
    if growth > 1 and (config.sliding_window is None or config.num_hidden_layers < 2):
        raise ConfigError(f"window_growth={growth}: needs a sliding_window and at least two layers")


def is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_range(low: Any, high: Any) -> bool:
    return _is_number(low) and (_is_number(high) or high == math.inf) and 0 <= low <= high


def check_mixers(config: HybridConfig) -> None:
    """Sizes that must fit each other, of the mixers that the layers have."""
    mixers = {name for spec in config.layer_specs for name in spec.mixers}
    if config.gate_granularity == "head":
        require_divides("num_attention_heads", config.num_attention_heads, "hidden_size", config.hidden_size)
    if "attention" in mixers:
        kv_heads, heads = config.num_key_value_heads, config.num_attention_heads
        require_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
        if config.head_dim % 2 and "rope" in (config.head_positions(True), config.head_positions(False)):
            raise ConfigError(f"head_dim={config.head_dim}: must be even, RoPE turns pairs of channels")
    _check_blocks(config)
    if "mamba" in mixers and config.mamba_type == "mamba2":
        require_divides("mamba_head_dim", config.mamba_head_dim, "mamba_expand * hidden_size", config.mamba_inner_size)
        require_divides("mamba_n_groups", config.mamba_n_groups, "the number of Mamba heads", config.mamba_num_heads)


def _check_blocks(config: HybridConfig) -> None:
    """Settings that need each other in the blocks there are."""
    blocks = {spec.block for spec in config.layer_specs}
    if config.num_experts > 1 and config.mlp_type == "none":
        raise ConfigError(f"num_experts={config.num_experts}: mlp_type='none' has no MLP to make experts of")
    if "parallel" in blocks:
        if config.mlp_type == "none":
            raise ConfigError("mlp_type='none': a parallel block has its MLP beside the mixer; give it one")
        if config.parallel_norms == 2 and config.norm_placement == "post":
            raise ConfigError("parallel_norms=2: with norm_placement=post the one norm stands behind; allowed: 1")
    if "hybrid" in blocks and config.alignment and config.fusion_rule != "gate" and config.mlp_type == "none":
        raise ConfigError("alignment=True: without a gate and an MLP nothing reads it; set alignment=False")
    joined = [spec for spec in config.layer_specs if spec.block != "hybrid" and len(spec.mixers) == 2]
    if joined and config.fusion_rule == "gate":
        raise ConfigError(f"fusion_rule='gate': two mixers in a {joined[0].block} block need sum or mean")
