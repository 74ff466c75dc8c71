import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from fusiontree import HybridLanguageModel
from fusiontree.errors import ConfigError
from fusiontree.eval import cache_bytes, measure_speed, weight_bytes
from fusiontree.eval.system.speed import percentile
from fusiontree.models.accounting import account
from fusiontree.models.presets import preset

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


def llama(**overrides) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**(SIZES | overrides))).float()


def test_models_take_turns_and_every_field_is_measured():
    turns: list[tuple[str, int]] = []
    models = {"small": llama(), "deep": llama(num_hidden_layers=3)}
    results = measure_speed(models, 12, 4, repeats=2, progress=lambda name, turn: turns.append((name, turn)))
    assert turns == [("small", -1), ("deep", -1), ("small", 0), ("deep", 0), ("small", 1), ("deep", 1)]
    for name, result in results.items():
        assert len(result.prefill_seconds) == len(result.decode_seconds) == 2
        assert result.prefill_tokens_per_second > 0 and result.decode_tokens_per_second > 0
        assert 0 < result.token_latency_p50 <= result.token_latency_p95 <= result.token_latency_p99
        assert result.weight_bytes == weight_bytes(models[name])
    # The last token is returned, never fed back: the cache holds prompt + new tokens - 1, keys and values, fp32.
    assert results["small"].cache_bytes == 2 * 2 * 15 * 32 * 4


def test_our_models_cache_is_what_the_accounting_says_plus_its_spare_room():
    config = preset("fusiontree", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                    mamba_head_dim=16, mamba_d_state=8, sliding_window=4, gate_rank=4)  # fmt: skip
    result = measure_speed({"ours": HybridLanguageModel(config)}, 24, 4, repeats=1)["ours"]
    states = sum(account(config, length=27).state_bytes.values())
    spare = 2 * 2 * (2 * 256 * 16 * 4)  # layers × (local, global) × room for 256 more keys and values in each buffer
    assert 0.95 * states <= result.cache_bytes <= states + spare


def test_rates_count_all_rows_of_a_batch_and_the_prefill_is_part_of_the_first_token():
    result = measure_speed({"only": llama()}, 12, 4, repeats=3, batch_size=2)["only"]
    assert result.prefill_tokens_per_second == 2 * 12 / sorted(result.prefill_seconds)[1]
    assert result.decode_tokens_per_second == 2 * 3 / sorted(result.decode_seconds)[1]
    assert result.time_to_first_token == sorted(result.first_token_seconds)[1]
    assert all(a < b for a, b in zip(result.prefill_seconds, result.first_token_seconds, strict=True))
    assert result.cache == {"kv": 2 * 2 * 2 * 15 * 32 * 4, "ssm": 0, "conv": 0, "other": 0}


def test_percentiles_are_values_that_occurred():
    values = [float(i) for i in range(1, 201)]
    assert [percentile(values, percent) for percent in (50, 95, 99)] == [100, 190, 198]
    assert [percentile([7.0], percent) for percent in (50, 99)] == [7, 7]


def test_an_end_token_does_not_shorten_the_run():
    model = llama()
    prompt = torch.randint(64, (1, 6), generator=torch.Generator().manual_seed(0))
    model.generation_config.eos_token_id = int(model(prompt).logits[0, -1].argmax())
    result = measure_speed({"only": model}, 6, 5, repeats=1)["only"]
    assert result.cache_bytes == 2 * 2 * 10 * 32 * 4


def test_weight_bytes_count_tied_weights_once():
    tied, untied = llama(tie_word_embeddings=True), llama()
    assert weight_bytes(untied) - weight_bytes(tied) == 64 * 32 * 4


def test_cache_bytes_count_kept_storage_not_the_view():
    cache = DynamicCache()
    base = torch.zeros(1, 1, 100, 4)
    cache.update(base[:, :, :10], base[:, :, 10:20], 0)
    assert cache_bytes({"cache": [cache, cache]}) >= 2 * 10 * 4 * 4
    assert cache_bytes({"a": base[:, :, :1], "b": [base]}) == 100 * 4 * 4


@pytest.mark.parametrize("arguments", [(0, 4, 1), (4, 1, 1), (4, 4, 0)])
def test_impossible_measurements_are_refused(arguments):
    with pytest.raises(ConfigError, match="at least 1, 2, 1 and 1"):
        measure_speed({"only": llama()}, *arguments)
