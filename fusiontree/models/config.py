"""`HybridConfig`: sizes and choices of a model, with one entry per layer.

The per-layer list makes FusionTree, its pruned exports, a LLaMA-like transformer and a pure Mamba the same class with
other data. An entry names the block form, the mixers in it, and what differs there from the model-wide settings.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from fusiontree.errors import ConfigError

MIXERS = ("mamba", "attention")
_MIXER_CHOICES = (["mamba"], ["attention"], ["attention", "mamba"])
_CHOICES: dict[str, tuple[str, ...]] = {
    "norm_placement": ("post", "pre", "sandwich"),
    "rope_scaling": ("none", "linear", "ntk"),
    "srte": ("sincos", "learned", "low_rank", "none"),
    "mlp_type": ("mlp", "swiglu", "none"),
    "hidden_act": ("gelu", "gelu_pytorch_tanh", "silu", "relu"),
    "gate_granularity": ("channel", "head", "token", "layer"),
    "checkpointing": ("branches", "block"),
}
_WHOLE = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "max_position_embeddings", "mamba_d_state", "mamba_d_conv", "mamba_head_dim", "mamba_n_groups", "mamba_chunk_size",
    "srte_rank", "gate_rank", "intermediate_size",
)  # fmt: skip
_POSITIVE = ("rope_theta", "rope_factor", "mamba_expand", "norm_eps")
_SWITCHES = ("srte_shared", "tie_word_embeddings", "use_cache")


@dataclass(frozen=True)
class LayerSpec:
    """One layer, all defaults resolved."""

    block: str  # "hybrid": the branches side by side, fused by the gate; "sequential": mixer, then MLP
    mixers: tuple[str, ...]
    sliding_window: int | None  # keys a local head sees, the query included; None: every head is global
    global_heads: int


class HybridConfig(PreTrainedConfig):
    """Configuration of `HybridLanguageModel`.

    Attention: `num_attention_heads` heads of which the first `global_heads` see everything and the rest the last
    `sliding_window` keys; RoPE of base `rope_theta`, stretched by `rope_factor` as `rope_scaling` says. Mamba: inner
    width `mamba_expand * hidden_size`, in heads of `mamba_head_dim`. SRTE: the time encoding added to the Mamba branch.
    Variants: `window_growth` G widens the window with depth, doubling in steps from `sliding_window` to G times that;
    `cross_rank` gives each branch a glance of that rank at the other; `gate_granularity`: how many gates a token has.
    `layers`: one dict per layer with any of block, mixers, sliding_window, global_heads; left out, every layer is a
    FusionTree block.
    """

    model_type = "fusiontree"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = None  # type: ignore[assignment]  # left out: num_attention_heads
    head_dim: int = None  # type: ignore[assignment]  # left out: hidden_size / num_attention_heads
    sliding_window: int | None = 256
    window_growth: int = 1
    global_heads: int = 1
    rope_theta: float = 10000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    max_position_embeddings: int = 2048

    mamba_d_state: int = 64
    mamba_d_conv: int = 4
    mamba_expand: float = 2.0
    mamba_head_dim: int = 64
    mamba_n_groups: int = 1
    mamba_chunk_size: int = 64
    mamba_dt_limit: tuple[float, float] | list[float] = (0.0, float("inf"))

    srte: str = "sincos"
    srte_rank: int = 128
    srte_shared: bool = True
    gate_rank: int = 64
    gate_granularity: str = "channel"
    cross_rank: int = 0  # 0: the branches do not see each other before the gate

    norm_placement: str = "post"
    norm_eps: float = 1e-6
    mlp_type: str = "mlp"
    intermediate_size: int = None  # type: ignore[assignment]  # left out: 2 * hidden_size
    hidden_act: str = "gelu"

    drop_branch_prob: float = 0.0
    checkpointing: str = "branches"
    layers: list[dict[str, Any]] = None  # type: ignore[assignment]  # left out: all FusionTree blocks
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        _check_sizes(self, ("hidden_size", "num_attention_heads"))  # the defaults are made of these
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 2 * self.hidden_size
        if self.head_dim is None:
            _require_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        _check_values(self)
        self.layers = _fill_layers(self)
        self._check_mixers()

    @property
    def layer_specs(self) -> list[LayerSpec]:
        """The layers with every default resolved."""
        return [
            LayerSpec(entry["block"], tuple(entry["mixers"]), entry["sliding_window"], entry["global_heads"])
            for entry in self.layers
        ]

    @property
    def mamba_inner_size(self) -> int:
        """Channels inside the Mamba branch."""
        return round(self.mamba_expand * self.hidden_size)

    @property
    def gates_per_token(self) -> int:
        """Different gates that a layer has for one token; each serves as many neighbouring channels."""
        counts = {"channel": self.hidden_size, "head": self.num_attention_heads}
        return counts.get(self.gate_granularity, 1)

    @property
    def mamba_num_heads(self) -> int:
        return self.mamba_inner_size // self.mamba_head_dim

    def _check_mixers(self) -> None:
        mixers = {name for spec in self.layer_specs for name in spec.mixers}
        if self.gate_granularity == "head":
            _require_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
        if "attention" in mixers:
            kv_heads, heads = self.num_key_value_heads, self.num_attention_heads
            _require_divides("num_key_value_heads", kv_heads, "num_attention_heads", heads)
            if self.head_dim % 2:
                raise ConfigError(f"head_dim={self.head_dim}: must be even, RoPE turns pairs of channels")
        if "mamba" in mixers:
            _require_divides("mamba_head_dim", self.mamba_head_dim, "mamba_expand * hidden_size", self.mamba_inner_size)
            _require_divides("mamba_n_groups", self.mamba_n_groups, "the number of Mamba heads", self.mamba_num_heads)


def _require_divides(what: str, value: Any, of_what: str, of: Any) -> None:
    if value < 1 or of % value:
        raise ConfigError(f"{what}={value}: must divide {of_what}={of}")


def _check_sizes(config: HybridConfig, names: Iterable[str]) -> None:
    for name in names:
        value = getattr(config, name)
        if not _is_whole(value) or value < 1:
            raise ConfigError(f"{name}={value!r}: must be a positive whole number")


def _check_values(config: HybridConfig) -> None:
    _check_sizes(config, _WHOLE)
    for name in _POSITIVE:
        if not _is_number(getattr(config, name)) or getattr(config, name) <= 0:
            raise ConfigError(f"{name}={getattr(config, name)!r}: must be a positive number")
    for name, allowed in _CHOICES.items():
        if getattr(config, name) not in allowed:
            raise ConfigError(f"{name}={getattr(config, name)!r}: must be one of {', '.join(allowed)}")
    for name in _SWITCHES:
        if not isinstance(getattr(config, name), bool):
            raise ConfigError(f"{name}={getattr(config, name)!r}: must be true or false")
    if not _is_whole(config.cross_rank) or config.cross_rank < 0:
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
    if not _is_whole(growth) or growth < 1 or growth & (growth - 1):
        raise ConfigError(f"window_growth={growth!r}: must be a power of two: 1, 2, 4, …")
    if growth > 1 and (config.sliding_window is None or config.num_hidden_layers < 2):
        raise ConfigError(f"window_growth={growth}: needs a sliding_window and at least two layers")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_range(low: Any, high: Any) -> bool:
    return _is_number(low) and (_is_number(high) or high == math.inf) and 0 <= low <= high


def _fill_layers(config: HybridConfig) -> list[dict[str, Any]]:
    """The per-layer list with model-wide settings filled in where an entry is silent."""
    entries = config.layers if config.layers is not None else [{} for _ in range(config.num_hidden_layers)]
    if not isinstance(entries, (list, tuple)) or not all(isinstance(entry, dict) for entry in entries):
        raise ConfigError(f"layers={entries!r}: must be a list with one mapping per layer")
    if len(entries) != config.num_hidden_layers:
        raise ConfigError(f"layers: {len(entries)} entries, but num_hidden_layers={config.num_hidden_layers}")
    filled = []
    for i, entry in enumerate(entries):
        default = _default_layer(config, i)
        unknown = set(entry) - set(default)
        if unknown:
            raise ConfigError(f"layers[{i}]: unknown key {sorted(unknown)[0]!r}; allowed: {', '.join(default)}")
        filled.append(_check_layer({**default, **entry}, i, config.num_attention_heads))
    return filled


def _default_layer(config: HybridConfig, i: int) -> dict[str, Any]:
    return {
        "block": "hybrid",
        "mixers": list(MIXERS),
        "sliding_window": _window_at(config, i),
        "global_heads": config.global_heads,
    }


def _window_at(config: HybridConfig, i: int) -> int | None:
    """The pyramid: the window doubles log2(growth) times over the depth, at even distances."""
    window = config.sliding_window
    if window is None or config.window_growth == 1 or not _is_whole(window):  # a wrong type is refused with its layer
        return window
    doublings = config.window_growth.bit_length() - 1
    last = config.num_hidden_layers - 1
    return window << (2 * doublings * i + last) // (2 * last)  # doublings · i / last, rounded


def _check_layer(layer: dict[str, Any], i: int, heads: int) -> dict[str, Any]:
    mixers, window, global_heads = layer["mixers"], layer["sliding_window"], layer["global_heads"]
    here = f"layers[{i}]"
    if layer["block"] not in ("hybrid", "sequential"):
        raise ConfigError(f"{here}.block={layer['block']!r}: must be hybrid or sequential")
    if not isinstance(mixers, (list, tuple)) or sorted(map(str, mixers)) not in _MIXER_CHOICES:
        raise ConfigError(f"{here}.mixers={mixers!r}: must be a list of mamba, attention or both, each once")
    if layer["block"] == "sequential" and len(mixers) != 1:
        raise ConfigError(f"{here}.mixers={mixers!r}: a sequential block has exactly one")
    if window is not None and (not _is_whole(window) or window < 1):
        raise ConfigError(
            f"{here}.sliding_window={window!r}: must be a whole number of keys ≥ 1, or null for no window"
        )
    if not _is_whole(global_heads) or not 0 <= global_heads <= heads:
        raise ConfigError(f"{here}.global_heads={global_heads!r}: must be between 0 and num_attention_heads={heads}")
    return {**layer, "mixers": sorted(mixers, key=MIXERS.index)}
