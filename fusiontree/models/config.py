"""`HybridConfig`: sizes and choices of a model, with one entry per layer.

The per-layer list makes FusionTree, its pruned exports, a LLaMA-like transformer and a pure Mamba the same class with
other data. An entry names the block form, the mixers in it, and what differs there from the model-wide settings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from fusiontree.models.config_checks import check_mixers, check_sizes, check_values, require_divides
from fusiontree.models.config_layers import MIXERS, fill_layers


@dataclass(frozen=True)
class LayerSpec:
    """One layer, all defaults resolved."""

    block: str  # "hybrid": branches, fused, and an MLP of both; "sequential": mixer, then MLP; "parallel": side by side
    mixers: tuple[str, ...]
    sliding_window: int | None  # keys a local head sees, the query included; None: every head is global
    global_heads: int


class HybridConfig(PreTrainedConfig):
    """Configuration of `HybridLanguageModel`.

    Attention: `num_attention_heads` heads of which the first `global_heads` see everything and the rest the last
    `sliding_window` keys. `position_encoding`: rope (base `rope_theta`, stretched by `rope_factor` as `rope_scaling`
    says), alibi, learned (a table added to the embeddings) or none; `global_position_encoding` where the heads that see
    everything have another. Mamba: `mamba_type` mamba2 or mamba1, inner width `mamba_expand * hidden_size`; mamba2 in
    heads of `mamba_head_dim`. SRTE: the time encoding added to the Mamba branch.
    Fusion: `fusion_rule` gate, sum, or mean (of the normed branches); without `alignment` the gate and the MLP see the
    branches' sum. `norm_type` rms or layer, `norm_placement` post, pre or sandwich; `parallel_norms`: whether mixer and
    MLP of a parallel block have a norm each. `mlp_type`: mlp (with `hidden_act`), swiglu, geglu or none; of more than
    one `num_experts` each token takes its best `experts_per_token`.
    Variants: `window_growth` G widens the window with depth, doubling in steps from `sliding_window` to G times that;
    `cross_rank` gives each branch a glance of that rank at the other; `gate_granularity`: how many gates a token has.
    `block` and `mixers`: what every layer is, a FusionTree block where nothing is said. `layers`: one dict per layer
    with any of block, mixers, sliding_window, global_heads, where it differs from that.
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
    position_encoding: str = "rope"
    global_position_encoding: str | None = None  # of heads that see everything; left out: as the others
    rope_theta: float = 10000.0
    rope_scaling: str = "none"
    rope_factor: float = 1.0
    rope_original_length: int | None = None  # YaRN's length before stretching; left out: max_position_embeddings
    max_position_embeddings: int = 2048

    mamba_type: str = "mamba2"
    mamba_d_state: int = 64
    mamba_d_conv: int = 4
    mamba_expand: float = 2.0
    mamba_head_dim: int = 64
    mamba_n_groups: int = 1
    mamba_dt_rank: int | None = None  # of Mamba-1; left out: hidden_size / 16
    mamba_chunk_size: int = 64
    mamba_dt_limit: tuple[float, float] | list[float] = (0.0, float("inf"))

    srte: str = "sincos"
    srte_rank: int = 128
    srte_shared: bool = True
    gate_rank: int = 64
    gate_granularity: str = "channel"
    cross_rank: int = 0  # 0: the branches do not see each other before the gate
    fusion_rule: str = "gate"
    alignment: bool = True

    norm_type: str = "rms"
    norm_placement: str = "post"
    norm_eps: float = 1e-6
    mlp_type: str = "mlp"
    intermediate_size: int = None  # type: ignore[assignment]  # left out: 2 * hidden_size
    hidden_act: str = "gelu"
    num_experts: int = 1
    experts_per_token: int = 1
    attention_bias: bool = False
    mlp_bias: bool = False
    embedding_norm: bool = False
    parallel_norms: int = 1

    drop_branch_prob: float = 0.0
    checkpointing: str = "branches"
    block: str = "hybrid"
    mixers: list[str] = None  # type: ignore[assignment]  # left out: both
    layers: list[dict[str, Any]] = None  # type: ignore[assignment]  # left out: all alike
    tie_word_embeddings: bool = True
    initializer_range: float = 0.02
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        check_sizes(self, ("hidden_size", "num_attention_heads"))  # the defaults are made of these
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.intermediate_size is None:
            self.intermediate_size = 2 * self.hidden_size
        if self.mixers is None:
            self.mixers = list(MIXERS)
        if self.head_dim is None:
            require_divides("num_attention_heads", self.num_attention_heads, "hidden_size", self.hidden_size)
            self.head_dim = self.hidden_size // self.num_attention_heads
        super().__post_init__(**kwargs)
        check_values(self)
        self.layers = fill_layers(self)
        check_mixers(self)

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

    @property
    def mamba_rank(self) -> int:
        """Rank of Mamba-1's step sizes."""
        return -(-self.hidden_size // 16) if self.mamba_dt_rank is None else self.mamba_dt_rank

    @property
    def mamba_channels(self) -> int:
        """Channels of the Mamba branch's convolution: x, and with Mamba-2 also B and C."""
        return self.mamba_inner_size + (
            2 * self.mamba_n_groups * self.mamba_d_state if self.mamba_type == "mamba2" else 0
        )

    def head_positions(self, sees_everything: bool) -> str:
        """How heads know where a key stands: rope, alibi or none."""
        name = self.position_encoding
        if sees_everything and self.global_position_encoding is not None:
            name = self.global_position_encoding
        return "none" if name == "learned" else name
