"""What a forward pass keeps for its backward, counted from the config alone.

Every term names the tensors that autograd holds: the inputs of matrix products, the results of exp, softmax, sigmoid
and tanh, both factors of a product. A test compares the sums with what autograd really holds. A new kind of mixer, norm
or gate has its terms here.
"""

from __future__ import annotations

from dataclasses import dataclass

from fusiontree.models.accounting import global_heads, has_gate, has_time, norms_of, projections
from fusiontree.models.config import HybridConfig, LayerSpec
from fusiontree.ops.attention import query_block, window_blocks
from fusiontree.ops.selective_scan import tokens_at_once

_F32 = 4
_SCAN_GROUP = 32  # chunk states combined by one matrix, see ops.ssd


@dataclass(frozen=True)
class Pass:
    """The shape of one forward and backward pass."""

    rows: int
    length: int
    value_bytes: int = 4
    """Of a matrix product's result: 2 under autocast, else 4."""
    packed: bool = True
    """Whether a row holds several documents, which costs masks."""
    device: str = "cuda"

    @property
    def tokens(self) -> int:
        return self.rows * self.length


@dataclass(frozen=True)
class LayerActivations:
    """Bytes of one layer."""

    mixers: int
    """Kept inside the branches: what selective checkpointing computes again."""
    around: int
    """Kept by the rest: norms, branch outputs, alignment, gate, MLP."""
    branch_input: int
    """What the branches are computed again from."""
    layer_input: int
    """What the whole layer is computed again from."""
    gate: int
    """The gate's values, which a watched layer hands out."""
    mixer_casts: int
    """The branches' weights in the precision of the products."""
    other_casts: int

    def kept(self, checkpointing: str, watched: bool) -> int:
        """Bytes that stand from the layer's forward to its backward."""
        if checkpointing == "block":
            return self.layer_input + (self.gate if watched else 0)
        if checkpointing == "branches":
            return self.branch_input + self.around + self.other_casts
        return self.whole

    def brought_back(self, checkpointing: str) -> int:
        """Bytes that going backwards through the layer adds: what is computed again, less what is done with by then."""
        if checkpointing == "block":
            return self.whole
        return max(0, self.mixers + self.mixer_casts - self.around) if checkpointing == "branches" else 0

    def forgotten_casts(self, checkpointing: str) -> int:
        """Bytes of cast weights that the forward makes and the backward will make again."""
        return {"none": 0, "branches": self.mixer_casts, "block": self.mixer_casts + self.other_casts}[checkpointing]

    @property
    def whole(self) -> int:
        return self.mixers + self.around + self.mixer_casts + self.other_casts


def layer_activations(config: HybridConfig, spec: LayerSpec, run: Pass) -> LayerActivations:
    """One layer of the given kind."""
    hidden, value = config.hidden_size, run.value_bytes
    mixers = 0.0
    if "mamba" in spec.mixers:
        mixers += _MAMBAS[config.mamba_type](config, run) + _mamba_input(config, spec, run)
    if "attention" in spec.mixers:
        mixers += _attention(config, spec, run) + hidden * value
    mixers += _joint(config, spec, run) if spec.block != "hybrid" else 0
    around = _around_hybrid(config, spec, run) if spec.block == "hybrid" else _around_plain(config, spec, run)
    casts = {part: 0 if value == _F32 else value * count for part, count in projections(config, spec).items()}
    inside = casts.pop("mamba", 0) + casts.pop("attention", 0)
    fused = has_gate(config, spec)
    return LayerActivations(
        mixers=round(mixers * run.tokens),
        around=round(around * run.tokens),
        branch_input=_F32 * hidden * run.tokens,
        layer_input=_F32 * hidden * run.tokens,
        gate=value * hidden * run.tokens if fused and config.gate_granularity in ("channel", "head") else 0,
        mixer_casts=inside,
        other_casts=sum(casts.values()),
    )


def shared_activations(config: HybridConfig, run: Pass, recomputes: bool) -> dict[str, int]:
    """Bytes that all layers share, and the output head's: positions, masks, final norm, the loss's gradients."""
    hidden, value, specs = config.hidden_size, run.value_bytes, config.layer_specs
    parts = {"ids": 8.0 * run.tokens, "masks": float(_masks(config, run))}
    if any("attention" in spec.mixers and "rope" in _positions(config, spec) for spec in specs):
        parts["rotary"] = value * config.head_dim * run.tokens
    if config.srte_shared and any(has_time(config, spec) for spec in specs):
        parts["srte"] = _time(config, run, recomputes) * run.tokens
    ends = config.embedding_norm + (config.norm_placement != "post")
    parts["norm"] = ends * _norm(config, run) * run.tokens
    parts["loss"] = value * hidden * (run.tokens + config.vocab_size)
    return {name: round(size) for name, size in parts.items()}


def _time(config: HybridConfig, run: Pass, recomputes: bool) -> float:
    """The time encoding: its result where it is needed again, and what its own backward needs."""
    hidden, value = config.hidden_size, run.value_bytes
    result = value if config.srte == "low_rank" else _F32
    own = {"sincos": _F32 * hidden, "learned": 0, "low_rank": value * config.srte_rank}[config.srte]
    return own + (result * hidden if recomputes else 0)


def _norm(config: HybridConfig, run: Pass) -> float:
    """One norm over the hidden size."""
    return _F32 * (config.hidden_size + 2) if config.norm_type == "layer" else _rms_norm(config.hidden_size, run)


def _rms_norm(size: int, run: Pass) -> float:
    """Its input in fp32; a CPU has no fused one and keeps the normed values before the weight, too."""
    return _F32 * (size + 1) + (_F32 * size if run.device == "cpu" else 0)


def _positions(config: HybridConfig, spec: LayerSpec) -> set[str]:
    """How the layer's groups of heads know positions."""
    wide, heads = global_heads(config, spec), config.num_attention_heads
    return {config.head_positions(every) for every, count in ((True, wide), (False, heads - wide)) if count}


def _around_hybrid(config: HybridConfig, spec: LayerSpec, run: Pass) -> float:
    hidden, value, outputs = config.hidden_size, run.value_bytes, len(spec.mixers)
    gated = config.fusion_rule == "gate"
    # The alignment's inner and residual half, its activation; its result, or the sum; what is fused.
    numbers = (3 * config.alignment + 1 + 1) * hidden + _mlp(config)
    if gated or config.alignment:
        numbers += outputs * hidden
    numbers += _gate(config) if gated else 0
    if config.cross_rank and outputs == 2:
        numbers += 2 * (hidden + config.cross_rank)
    return norms_of(config, spec) * _norm(config, run) + _joint(config, spec, run) + value * numbers


def _joint(config: HybridConfig, spec: LayerSpec, run: Pass) -> float:
    """What joins branches without a gate; in plain blocks a part of what selective checkpointing computes again."""
    if config.fusion_rule != "mean":
        return 0
    kept_anyway = spec.block == "hybrid" and config.alignment and run.value_bytes == _F32
    return len(spec.mixers) * (_rms_norm(config.hidden_size, run) - _F32 * config.hidden_size * kept_anyway)


def _gate(config: HybridConfig) -> int:
    """Numbers: the hidden values and the gates; one that serves several channels is also written out for each."""
    if config.gate_granularity == "layer":
        return 0
    written_out = config.hidden_size if config.gate_granularity == "head" else 0
    return config.gate_rank + config.gates_per_token + written_out


def _around_plain(config: HybridConfig, spec: LayerSpec, run: Pass) -> float:
    """Norms, the MLP and its input, which a parallel block shares with the mixer where they share the norm."""
    around = norms_of(config, spec) * _norm(config, run)
    if config.mlp_type == "none":
        return around
    shared = spec.block == "parallel" and config.parallel_norms == 1 and run.value_bytes == _F32
    if spec.block == "parallel" and config.parallel_norms == 2:
        around -= _F32 * config.hidden_size  # both norms read the same tensor
    return around + run.value_bytes * (config.hidden_size * (not shared) + _mlp(config))


def _mlp(config: HybridConfig) -> int:
    """Numbers: before and after the activation; a gated unit has a second factor and the product, too. Of experts those
    of the chosen ones, and for each its input and its result before and after it is weighed, and the router's."""
    inner = {"mlp": 2, "swiglu": 4, "geglu": 4, "none": 0}[config.mlp_type] * config.intermediate_size
    if config.num_experts == 1:
        return inner
    return config.experts_per_token * (inner + 3 * config.hidden_size) + 2 * config.num_experts


def _mamba_input(config: HybridConfig, spec: LayerSpec, run: Pass) -> float:
    """norm(x) plus the time encoding; without an encoding fp32 products share one tensor with the other branch."""
    shared = run.value_bytes == _F32 and not has_time(config, spec) and "attention" in spec.mixers
    return 0 if shared else config.hidden_size * run.value_bytes


def _mamba(config: HybridConfig, run: Pass) -> float:
    inner, heads, channels, value = (
        config.mamba_inner_size, config.mamba_num_heads, config.mamba_channels, run.value_bytes,
    )  # fmt: skip
    # Gated norm: z, silu(z), y, their product and the normed product, all fp32, and the result. fp32 products: z is a
    # part of the projection's result, which is kept whole.
    projected = inner + channels + heads if value == _F32 else inner
    gated = _F32 * (projected + 4 * inner) + value * inner
    convolution = value * channels * (1 + (config.mamba_d_conv - 1) / run.length)
    return gated + convolution + _scan(config, run)


def _mamba1(config: HybridConfig, run: Pass) -> float:
    """See ops.selective_scan: its inputs in fp32, and the state that enters each piece."""
    inner, state, value = config.mamba_inner_size, config.mamba_d_state, run.value_bytes
    # The projection, whose half z is; what is convolved and its result; y, silu(z) and their product.
    numbers = (2 + 1 + (config.mamba_d_conv - 1) / run.length + 1 + 3) * inner + config.mamba_rank + 2 * state
    exact = 2 * inner  # the steps before and after softplus
    exact += inner + 2 * state if value != _F32 else 0
    pieces = -(-run.length // tokens_at_once(run.rows, inner, state, run.device))
    return value * numbers + _F32 * (exact + pieces / run.length * inner * state)


_MAMBAS = {"mamba2": _mamba, "mamba1": _mamba1}


def _scan(config: HybridConfig, run: Pass) -> float:
    """See ops.ssd: decay weights within a chunk (their exp, times dt), scores, and the chunk states."""
    inner, heads, state, value = config.mamba_inner_size, config.mamba_num_heads, config.mamba_d_state, run.value_bytes
    chunk = min(config.mamba_chunk_size, run.length)
    chunks = -(-run.length // chunk)
    filled = chunks * chunk / run.length  # the last chunk is filled up
    within = heads * chunk * (2 * _F32 + value) + config.mamba_n_groups * chunk * value
    within += 1 + chunk if run.packed else 0
    steps = _F32 * heads * (6 + (1 if run.packed else 0))
    weighted = value * (2 * heads * state + inner)  # what is written, what is read, and x
    # B and C: parts of the convolution's result, which they keep whole, or copies where a chunk was filled up.
    kinds, groups = 2 * config.mamba_n_groups * state, config.mamba_n_groups
    grouped = value * (kinds * (2 if groups > 1 and filled == 1 else 1) + (inner if filled == 1 else 0))
    cells = inner * state / chunk  # of a chunk's state, per token
    rounds = 1 + 1 / chunks if chunks <= _SCAN_GROUP else 1 + 3 / _SCAN_GROUP
    return filled * (within + steps + weighted + grouped + cells * (value + _F32 * rounds))


def _attention(config: HybridConfig, spec: LayerSpec, run: Pass) -> float:
    """Per group of heads: queries, keys, values and what the kernel keeps; then the output projection's input."""
    heads, kv_heads, size = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    wide = global_heads(config, spec)
    window = spec.sliding_window if spec.sliding_window is not None and spec.sliding_window < run.length else None
    groups = [(0, wide, None), (wide, heads, window)]
    groups = [group for group in groups if group[1] > group[0]]
    total, views = 0.0, set()
    for first, end, seen in groups:
        if seen is not None:
            total += _window(end - first, size, seen, run)
            continue
        shares, whole = heads // kv_heads, _whole_groups(config, first, end)
        views |= {"queries"} if shares > 1 or not whole else {"queries", "values"}
        copied = 0 if shares == 1 and whole else 2
        total += (end - first) * ((1 + copied) * size * run.value_bytes + _F32) + _blocks(run)
    # Views keep the tensors they look into: the turned queries and keys, and the projection's result.
    turned = "rope" in _positions(config, spec)
    total += size * run.value_bytes * ((heads + kv_heads) * ("queries" in views and turned))
    total += size * run.value_bytes * ((heads + 2 * kv_heads) * ("values" in views or (bool(views) and not turned)))
    # SDPA lays its result out as the output projection wants it: one tensor serves both.
    single = len(groups) == 1 and groups[0][2] is None and not _blocks(run)
    return total + (0 if single else heads * size * run.value_bytes)


def _whole_groups(config: HybridConfig, first: int, end: int) -> bool:
    """Whether these query heads are all those of their key/value heads."""
    shares = config.num_attention_heads // config.num_key_value_heads
    return first % shares == 0 and end % shares == 0


def _window(heads: int, size: int, window: int, run: Pass) -> float:
    """Blocks of queries, each with a copy of the keys and values it may see; see ops.attention."""
    block, before = window_blocks(run.length, window)
    filled = -(-run.length // block) * block / run.length
    copies = run.value_bytes * size * (1 + 2 * (before + 1))
    if run.device == "cpu":
        return heads * filled * (copies + run.value_bytes * (before + 1) * block)  # the softmax, in the open
    return heads * filled * (copies + run.value_bytes * size + _F32)


def _blocks(run: Pass) -> float:
    """Masks of heads that see everything, where they are built in blocks of queries: each layer keeps its own."""
    block = query_block(run.length, run.length)
    if not run.packed or block == run.length:
        return 0
    ends = [min(begin + block, run.length) for begin in range(0, run.length, block)]
    sizes = (end * min(block, end - begin) for begin, end in zip(range(0, run.length, block), ends, strict=True))
    return run.value_bytes * sum(sizes) / run.length


def _masks(config: HybridConfig, run: Pass) -> int:
    """Masks that layers with the same window share, as addends."""
    specs = [spec for spec in config.layer_specs if "attention" in spec.mixers]
    windows = {spec.sliding_window for spec in specs if global_heads(config, spec) < config.num_attention_heads}
    rows, total = run.rows if run.packed else 1, 0
    for window in windows:
        if window is not None and window < run.length:
            block, before = window_blocks(run.length, window)
            total += rows * -(-run.length // block) * block * (before + 1) * block
    wide = any(global_heads(config, spec) for spec in specs) and config.head_positions(True) != "alibi"
    wide |= any(w and w >= run.length for w in windows) and not _falls_locally(config)
    if run.packed and wide and query_block(run.length, run.length) == run.length:
        total += rows * run.length**2
    return run.value_bytes * (total + sum(_falls(group, rows, run) for group in _alibi_groups(config)))


def _alibi_groups(config: HybridConfig) -> set[tuple[int, int | None]]:
    """Heads and window of each group that has ALiBi."""
    groups: set[tuple[int, int | None]] = set()
    for spec in config.layer_specs:
        wide, heads = global_heads(config, spec), config.num_attention_heads
        if "attention" in spec.mixers:
            groups |= {(wide, None)} if wide and config.head_positions(True) == "alibi" else set()
            groups |= {(heads - wide, spec.sliding_window)} if heads > wide and _falls_locally(config) else set()
    return groups


def _falls_locally(config: HybridConfig) -> bool:
    return config.head_positions(False) == "alibi"


def _falls(group: tuple[int, int | None], rows: int, run: Pass) -> int:
    """Numbers in ALiBi's part of the scores, which layers share; of windows in blocks one block's."""
    heads, window = group
    if window is not None and window < run.length:
        block, before = window_blocks(run.length, window)
        return heads * block * block * (before + 1)
    return rows * heads * run.length**2 if query_block(run.length, run.length, heads) == run.length else 0
