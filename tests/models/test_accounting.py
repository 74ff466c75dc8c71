"""The model's own account equals the real model: parameters, bytes, and FLOPs as torch counts them."""

import itertools
from collections import Counter

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fusiontree.models import HybridCache, HybridLanguageModel, account
from tests.models.kinds import KINDS, build, config_of, shared_model, tokens

PART_OF = {
    "embed_tokens": "embedding",
    "position_table": "positions",
    "embedding_norm": "norm",
    "branch_norms": "norm",
    "mlp_out_norm": "norm",
    "lm_head": "lm_head",
    "srte": "srte",
    "mamba": "mamba",
    "attention": "attention",
    "alignment": "alignment",
    "cross": "cross",
    "gate": "gate",
    "fusion_proj": "fusion_proj",
    "mlp": "mlp",
    "norm": "norm",
    "out_norm": "norm",
    "mlp_norm": "norm",
}


def part_of(name: str) -> str:
    words = name.split(".")
    for word in ("branch_norms", "alignment", "cross", "mamba", "attention", "srte"):
        if word in words:
            return PART_OF.get(word, word)
    return next(PART_OF[word] for word in words if word in PART_OF)


def real_parts(model: HybridLanguageModel) -> dict[str, int]:
    counts = Counter()
    for name, parameter in model.named_parameters():
        counts[part_of(name)] += parameter.numel()
    return dict(counts)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_by_part(kind: str) -> None:
    model, counted = shared_model(kind), account(config_of(kind))
    assert {part: n for part, n in counted.parameters.items() if n} == real_parts(model)
    for layer, block in zip(counted.per_layer, model.model.layers, strict=True):
        assert sum(layer.parameters.values()) == sum(p.numel() for p in block.parameters())
    assert counted.total_parameters == model.num_parameters()


def test_parameters_over_combinations() -> None:
    choices = itertools.product(
        ("post", "pre", "sandwich"),
        ("mlp", "geglu", "none"),
        (("sincos", True), ("learned", False), ("low_rank", False), ("low_rank", True), ("none", True)),
        (True, False),
        (["mamba"], ["attention"], ["mamba", "attention"]),
    )
    norms = itertools.cycle(
        [{"norm_type": "layer", "embedding_norm": True}, {"attention_bias": True}, {"mlp_bias": True}]
    )
    for (placement, mlp, (srte, shared), tied, last), more in zip(choices, norms, strict=False):
        config = config_of(
            "post",
            norm_placement=placement,
            mlp_type=mlp,
            srte=srte,
            srte_shared=shared,
            tie_word_embeddings=tied,
            layers=[{"block": "sequential", "mixers": ["attention"]}, {"mixers": last}],
            num_key_value_heads=2,
            intermediate_size=40,
            **more,
        )
        with torch.device("meta"):
            model = HybridLanguageModel(config)
        assert account(config).total_parameters == model.num_parameters(), config.layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind", ["post", "gqa_shared", "window_odd", "mixed", "pruned", "llama", "mamba2", "groups", "mamba"]
)
@torch.no_grad()
def test_state_bytes_are_the_caches(kind: str, dtype: torch.dtype) -> None:
    model = build(kind).to(dtype)
    for length in (1, 30, 101):
        cache = HybridCache(model.config)
        model(tokens(3, length), past_key_values=cache)
        counted = account(model.config, length, 3, dtype_bytes=dtype.itemsize)
        assert sum(counted.state_bytes.values()) == cache.state_bytes()
        shares = Counter()
        for layer in cache.layers:
            names = {"ssm": layer.ssm_state, "conv": layer.conv_state}
            names |= {"local_kv": layer.local.tensors(), "global_kv": layer.everywhere.tensors()}
            shares.update({k: t.numel() * t.element_size() for k, t in names.items() if t is not None})
        assert {**dict.fromkeys(("ssm", "conv", "local_kv", "global_kv"), 0), **shares} == {
            k: v for k, v in counted.state_bytes.items() if k != "progress"
        }


def test_weight_bytes_are_the_models(tmp_path) -> None:
    model = build("mixed")
    counted = account(model.config)
    assert counted.weight_bytes() == sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path)
    half = HybridLanguageModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert counted.weight_bytes(2) == sum(p.numel() * p.element_size() for p in half.parameters())


COUNTED = [
    "post", "sandwich", "gqa_shared", "srte_low_rank", "mixed", "llama", "mamba2", "untied", "cross_pruned",
    "gate_head", "gate_token", "gpt2", "falcon", "mamba", "hymba", "global_none",
]  # fmt: skip


@pytest.mark.parametrize("kind", COUNTED)
@torch.no_grad()
def test_flops_are_those_torch_counts(kind: str) -> None:
    """All but the attention scores, where torch counts masked keys too, or (SDPA on a CPU) nothing."""
    length = 256
    model = build(kind, hidden_size=64, mamba_chunk_size=32)
    counted = account(model.config, length)
    with FlopCounterMode(display=False) as counter:
        model(tokens(2, length), use_cache=False)
    by_module = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    theirs = by_module["Global"]
    for name, flops in by_module.items():
        theirs -= flops if name.endswith("mixers.attention") else 0
        theirs += flops if "mixers.attention." in name else 0
    one_key = account(model.config, 1).flops["attention"] - 4 * _query_width(model)
    ours = counted.flops_per_token - counted.flops["attention"] + one_key - _elementwise(model)
    assert ours == pytest.approx(theirs / (2 * length), rel=0.03)


def _elementwise(model: HybridLanguageModel) -> int:
    """Work of the selective scan that is no matrix product, which torch does not count."""
    config = model.config
    layers = sum("mamba" in spec.mixers for spec in config.layer_specs) if config.mamba_type == "mamba1" else 0
    return layers * 8 * config.mamba_inner_size * config.mamba_d_state


def _query_width(model: HybridLanguageModel) -> int:
    config = model.config
    layers = sum("attention" in spec.mixers for spec in config.layer_specs)
    return layers * config.num_attention_heads * config.head_dim


def test_attention_flops_are_the_keys_in_sight() -> None:
    config = config_of("gqa_shared", sliding_window=5, global_heads=1)
    one = 4 * config.head_dim * config.num_hidden_layers
    for length in (1, 4, 5, 6, 100):
        everything = sum(t + 1 for t in range(length)) / length
        window = sum(min(t + 1, 5) for t in range(length)) / length
        projections = account(config, 1).flops["attention"] - one * 4
        want = projections + one * (everything + 3 * window)
        assert account(config, length).flops["attention"] == pytest.approx(want)


def test_growth_is_linear_but_for_global_heads() -> None:
    short, long = (account(config_of("local_only"), length) for length in (1024, 32768))
    assert long.flops_per_token == pytest.approx(short.flops_per_token, rel=0.05)
    assert long.state_bytes == short.state_bytes
    short, long = (account(config_of("llama"), length) for length in (1024, 32768))
    assert long.state_bytes["global_kv"] == 32 * short.state_bytes["global_kv"]
