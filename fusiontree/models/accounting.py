"""What a model costs, counted from its config alone: parameters, FLOPs, bytes of weights and states.

FLOPs are of one forward over `length` tokens, a multiply and an add being two; attention counts only the keys that a
query may see.
Shapes: H hidden, L length, Q chunk, P head size, N state, G groups, W window, V vocabulary.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from fusiontree.models.config import HybridConfig, LayerSpec

PARTS = (
    "embedding", "positions", "srte", "mamba", "attention", "cross", "alignment", "gate", "fusion_proj", "mlp", "norm",
    "lm_head",
)  # fmt: skip
MLP_MATRICES = {"mlp": 2, "swiglu": 3, "geglu": 3, "none": 0}
_SCAN_GROUP = 32  # chunk states combined by one matrix, see ops.ssd
_PROGRESS_BYTES = 16  # two int64 per row of a cache: age and position


@dataclass(frozen=True)
class LayerAccount:
    """One layer's share."""

    layer: int
    block: str
    mixers: tuple[str, ...]
    parameters: dict[str, int]  # part → count
    flops_per_token: float
    state_bytes: dict[str, int]  # ssm, conv, local_kv, global_kv


@dataclass(frozen=True)
class Accounting:
    """What `account` returns."""

    length: int
    batch_size: int
    parameters: dict[str, int]  # part → count; lm_head is 0 when tied
    flops: dict[str, float]  # part → forward FLOPs per token
    state_bytes: dict[str, int]  # ssm, conv, local_kv, global_kv, progress → bytes a cache holds after `length` tokens
    fp32_parameters: int  # A_log, dt_bias and D: fp32 whatever the weights' dtype
    per_layer: list[LayerAccount]

    @property
    def total_parameters(self) -> int:
        return sum(self.parameters.values())

    @property
    def flops_per_token(self) -> float:
        """Forward FLOPs per token at `length`; a training step costs about three times as much."""
        return sum(self.flops.values())

    def weight_bytes(self, dtype_bytes: int = 4) -> int:
        """Bytes of the weights in a dtype of `dtype_bytes`."""
        return self.total_parameters * dtype_bytes + self.fp32_parameters * (4 - dtype_bytes)


def account(config: HybridConfig, length: int = 1024, batch_size: int = 1, dtype_bytes: int = 4) -> Accounting:
    """Count `config` for `batch_size` rows of `length` tokens; `dtype_bytes` is the size of a cached value."""
    layers = []
    parameters, flops = Counter(dict.fromkeys(PARTS, 0)), Counter(dict.fromkeys(PARTS, 0.0))
    specs = config.layer_specs
    kinds = {
        spec: (
            _layer_parameters(config, spec),
            _layer_flops(config, spec, length),
            _layer_states(config, spec, length, batch_size, dtype_bytes),
        )
        for spec in set(specs)
    }
    for i, spec in enumerate(specs):
        own, work, states = kinds[spec]
        layers.append(LayerAccount(i, spec.block, spec.mixers, dict(own), sum(work.values()), dict(states)))
        parameters.update(own)
        flops.update(work)
    vocabulary = config.vocab_size * config.hidden_size
    parameters["embedding"] = vocabulary
    parameters["lm_head"] = 0 if config.tie_word_embeddings else vocabulary
    parameters["positions"] = _table_parameters(config)
    parameters["norm"] += _norm_parameters(config) * (config.embedding_norm + (config.norm_placement != "post"))
    flops["lm_head"] = 2 * vocabulary
    if config.srte_shared and any(has_time(config, spec) for spec in config.layer_specs):
        parameters["srte"] += _srte_parameters(config)
        flops["srte"] += _srte_flops(config)
    states = Counter({"ssm": 0, "conv": 0, "local_kv": 0, "global_kv": 0})
    for layer in layers:
        states.update(layer.state_bytes)
    mamba_layers = sum("mamba" in spec.mixers for spec in config.layer_specs)
    return Accounting(
        length=length,
        batch_size=batch_size,
        parameters=dict(parameters),
        flops=dict(flops),
        state_bytes={**states, "progress": _PROGRESS_BYTES * batch_size},
        fp32_parameters=_mamba_fp32(config) * mamba_layers,
        per_layer=layers,
    )


def _table_parameters(config: HybridConfig) -> int:
    return config.max_position_embeddings * config.hidden_size if config.position_encoding == "learned" else 0


def _norm_parameters(config: HybridConfig) -> int:
    """Of one norm over the hidden size."""
    return config.hidden_size * (2 if config.norm_type == "layer" else 1)


def has_time(config: HybridConfig, spec: LayerSpec) -> bool:
    return config.srte != "none" and spec.block == "hybrid" and "mamba" in spec.mixers


def _srte_parameters(config: HybridConfig) -> int:
    length, hidden, rank = config.max_position_embeddings, config.hidden_size, config.srte_rank
    return {"sincos": 1, "learned": length * hidden, "low_rank": (length + hidden) * rank}[config.srte]


def _srte_flops(config: HybridConfig) -> int:
    return 2 * config.srte_rank * config.hidden_size if config.srte == "low_rank" else 0


def has_gate(config: HybridConfig, spec: LayerSpec) -> bool:
    """Whether a gate stands between two branches of the layer."""
    return spec.block == "hybrid" and config.fusion_rule == "gate" and len(spec.mixers) == 2


def _mamba_fp32(config: HybridConfig) -> int:
    """A_log, dt_bias and D of one layer."""
    inner = config.mamba_inner_size
    return 3 * config.mamba_num_heads if config.mamba_type == "mamba2" else inner * (config.mamba_d_state + 2)


def _mamba_projections(config: HybridConfig) -> int:
    hidden, inner = config.hidden_size, config.mamba_inner_size
    if config.mamba_type == "mamba2":
        return hidden * (2 * inner + config.mamba_channels + config.mamba_num_heads)
    return 3 * hidden * inner + inner * (2 * config.mamba_rank + 2 * config.mamba_d_state)


def projections(config: HybridConfig, spec: LayerSpec) -> Counter[str]:
    """Weights that stand in a matrix product with every token, by part."""
    hidden, counts = config.hidden_size, Counter[str]()
    if "mamba" in spec.mixers:
        counts["mamba"] = _mamba_projections(config)
    if "attention" in spec.mixers:
        query = config.num_attention_heads * config.head_dim
        counts["attention"] = 2 * hidden * (query + config.num_key_value_heads * config.head_dim)
    if spec.block == "hybrid":
        counts["alignment"] = (hidden * 2 * hidden * len(spec.mixers) + hidden * hidden) * config.alignment
        counts["cross"] = 4 * hidden * config.cross_rank if len(spec.mixers) == 2 else 0
        if config.fusion_rule == "gate" and config.gate_granularity != "layer":
            counts["gate"] = (hidden + config.gates_per_token) * config.gate_rank
        counts["fusion_proj"] = hidden * hidden
    counts["mlp"] = config.num_experts * _expert(config)
    counts["mlp"] += hidden * config.num_experts if config.num_experts > 1 else 0  # the router
    return counts


def _expert(config: HybridConfig) -> int:
    """Weights of one MLP's products."""
    return MLP_MATRICES[config.mlp_type] * config.hidden_size * config.intermediate_size


def norms_of(config: HybridConfig, spec: LayerSpec) -> int:
    """Norms over the hidden size in a layer, those of the branches left out."""
    sandwich, has_mlp = config.norm_placement == "sandwich", config.mlp_type != "none"
    if spec.block == "hybrid":
        return 1 + (config.norm_placement != "pre")
    if spec.block == "parallel":
        return config.parallel_norms + sandwich
    return (1 + has_mlp) * (1 + sandwich)


def _layer_parameters(config: HybridConfig, spec: LayerSpec) -> Counter[str]:
    counts, hidden = projections(config, spec), config.hidden_size
    if spec.block == "hybrid" and config.fusion_rule == "gate":
        counts["gate"] += config.gate_granularity == "layer"
    branch_norms = len(spec.mixers) if config.fusion_rule == "mean" else 0
    counts["norm"] = norms_of(config, spec) * _norm_parameters(config) + branch_norms * hidden
    if "attention" in spec.mixers and config.attention_bias:
        heads = config.num_attention_heads + 2 * config.num_key_value_heads
        counts["attention"] += heads * config.head_dim + hidden
    if config.mlp_bias and config.mlp_type != "none":
        biases = (MLP_MATRICES[config.mlp_type] - 1) * config.intermediate_size + hidden
        counts["mlp"] += config.num_experts * biases
    if "mamba" in spec.mixers:
        counts["mamba"] += config.mamba_channels * (config.mamba_d_conv + 1) + _mamba_fp32(config)
        counts["mamba"] += config.mamba_inner_size if config.mamba_type == "mamba2" else 0  # the gated norm
    if has_time(config, spec) and not config.srte_shared:
        counts["srte"] = _srte_parameters(config)
    return counts


def _layer_flops(config: HybridConfig, spec: LayerSpec, length: int) -> Counter[str]:
    """Per token, mean over a row of `length`."""
    flops: Counter[str] = Counter({part: 2 * count for part, count in projections(config, spec).items()})
    flops["mlp"] -= 2 * (config.num_experts - config.experts_per_token) * _expert(config)  # those not chosen
    if "mamba" in spec.mixers:
        scan = _ssd_flops(config, length) if config.mamba_type == "mamba2" else _selective_flops(config)
        flops["mamba"] += 2 * config.mamba_d_conv * config.mamba_channels + scan  # type: ignore[assignment]
    if "attention" in spec.mixers:
        flops["attention"] += _attention_flops(config, spec, length)  # type: ignore[assignment]
    if has_time(config, spec) and not config.srte_shared:
        flops["srte"] += _srte_flops(config)
    return flops


def _ssd_flops(config: HybridConfig, length: int) -> float:
    """Scores C·Bᵀ, scores·x, what a chunk writes, what a token reads from the entering state, chunk states combined."""
    chunk = min(config.mamba_chunk_size, length)
    state, inner = config.mamba_d_state, config.mamba_inner_size
    within = 2 * chunk * (config.mamba_n_groups * state + inner)
    chunks = min(-(-length // chunk), _SCAN_GROUP)
    combined = 2 * inner * state * (chunks + 1) ** 2 / (chunks * chunk)
    return within + 4 * inner * state + combined


def _selective_flops(config: HybridConfig) -> int:
    """Per channel and state: dt·A and its exp, what is written, the chunk's recurrence and decay, the entering state,
    and the one product, with C."""
    return 10 * config.mamba_inner_size * config.mamba_d_state


def global_heads(config: HybridConfig, spec: LayerSpec) -> int:
    return config.num_attention_heads if spec.sliding_window is None else spec.global_heads


def _attention_flops(config: HybridConfig, spec: LayerSpec, length: int) -> float:
    """Scores and weighted values over the keys that a query sees, on average over the row."""
    wide = global_heads(config, spec)
    window = min(spec.sliding_window or length, length)
    seen_by_all = (length + 1) / 2
    seen_in_window = window - window * (window - 1) / (2 * length)
    heads = wide * seen_by_all + (config.num_attention_heads - wide) * seen_in_window
    return 4 * config.head_dim * heads


def _layer_states(config: HybridConfig, spec: LayerSpec, length: int, rows: int, dtype_bytes: int) -> dict[str, int]:
    """Bytes held after a prefill of `length` tokens."""
    states = {"ssm": 0, "conv": 0, "local_kv": 0, "global_kv": 0}
    if "mamba" in spec.mixers:
        states["ssm"] = 4 * rows * config.mamba_inner_size * config.mamba_d_state
        states["conv"] = dtype_bytes * rows * config.mamba_channels * (config.mamba_d_conv - 1)
    if "attention" in spec.mixers:
        wide, heads = global_heads(config, spec), config.num_attention_heads
        per_key = 2 * dtype_bytes * rows * config.head_dim
        states["global_kv"] = per_key * length * _kv_heads(config, 0, wide)
        kept = min((spec.sliding_window or 1) - 1, length)  # the next token brings the window's last key itself
        states["local_kv"] = per_key * kept * _kv_heads(config, wide, heads)
    return states


def _kv_heads(config: HybridConfig, first: int, end: int) -> int:
    """Key/value heads that query heads first … end - 1 use; one that serves global and local heads is held twice."""
    shares = config.num_attention_heads // config.num_key_value_heads
    return (end - 1) // shares - first // shares + 1 if end > first else 0
