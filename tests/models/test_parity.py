"""Against code we did not write: transformers' models with the same weights, there and back."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from fusiontree.errors import ConfigError
from fusiontree.models import HybridCache, HybridLanguageModel, from_transformers, preset, to_transformers
from fusiontree.models.convert import FAMILIES
from fusiontree.models.positions import Positions
from fusiontree.models.segments import Segments
from tests.models.kinds import VOCAB, assert_same, draw_weights, tokens

LENGTH = 63
ATTENTION = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MAMBA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 16,
    "num_hidden_layers": 2,
    "chunk_size": 8,
}


def llama(**overrides: object) -> PreTrainedModel:
    return drawn(LlamaForCausalLM(LlamaConfig(**{**ATTENTION, **overrides})))


def mistral(**overrides: object) -> PreTrainedModel:
    return drawn(MistralForCausalLM(MistralConfig(**{**ATTENTION, "sliding_window": 7, **overrides})))


def mamba2(**overrides: object) -> PreTrainedModel:
    return drawn(Mamba2ForCausalLM(Mamba2Config(**{**MAMBA, "n_groups": 1, **overrides})))


def mamba(**overrides: object) -> PreTrainedModel:
    sizes = {name: MAMBA[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    return drawn(MambaForCausalLM(MambaConfig(**{**sizes, "state_size": 5, **overrides})))


def gpt2(**overrides: object) -> PreTrainedModel:
    return drawn(GPT2LMHeadModel(GPT2Config(**{**SMALL, "n_positions": 128, **overrides})))


def bloom(**overrides: object) -> PreTrainedModel:
    return drawn(BloomForCausalLM(BloomConfig(**{**SMALL, **overrides})))


def falcon(**overrides: object) -> PreTrainedModel:
    return drawn(FalconForCausalLM(FalconConfig(**{**SMALL, **overrides})))


def drawn(model: PreTrainedModel) -> PreTrainedModel:
    draw_weights(model)
    return model.eval()


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500.0, "original_max_position_embeddings": 16}
PAIRS = {
    "llama": lambda: llama(),
    "llama_gqa": lambda: llama(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama_mqa": lambda: llama(num_key_value_heads=1, head_dim=16),
    "llama_rope": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama_stretched": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}),
    "llama_yarn": lambda: llama(rope_parameters=YARN, max_position_embeddings=64),
    "llama_biases": lambda: llama(attention_bias=True, mlp_bias=True, num_key_value_heads=2),
    "gpt2": lambda: gpt2(),
    "gpt2_relu": lambda: gpt2(activation_function="relu", n_inner=40, layer_norm_epsilon=1e-3),
    "bloom": lambda: bloom(),
    "bloom_odd": lambda: bloom(num_attention_heads=6, hidden_size=36, tie_word_embeddings=False),
    "falcon": lambda: falcon(),
    "falcon_biases": lambda: falcon(bias=True, multi_query=False, ffn_hidden_size=40),
    "falcon_in_turn": lambda: falcon(parallel_attn=False, multi_query=False, num_kv_heads=4),
    "falcon_new": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2),
    "falcon_new_one_norm": lambda: falcon(new_decoder_architecture=True, num_kv_heads=2, num_ln_in_parallel_attn=1),
    "mistral": lambda: mistral(num_key_value_heads=2),
    "mistral_wide": lambda: mistral(num_key_value_heads=4, sliding_window=64),
    "mistral_one": lambda: mistral(num_key_value_heads=1, sliding_window=2),
    "mamba": lambda: mamba(),
    "mamba_odd": lambda: mamba(
        time_step_rank=3,
        conv_kernel=3,
        expand=3,
        use_conv_bias=False,
        tie_word_embeddings=False,
        layer_norm_epsilon=1e-3,
    ),
    "mamba2": lambda: mamba2(),
    "mamba2_groups": lambda: mamba2(n_groups=4, conv_kernel=3, layer_norm_epsilon=1e-3),
    "mamba2_tied": lambda: mamba2(tie_word_embeddings=True, use_conv_bias=False, expand=4, num_heads=16),
}


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_logits(name: str) -> None:
    theirs = PAIRS[name]()
    ours, ids = from_transformers(theirs), tokens(3, LENGTH)
    want = theirs(ids).logits
    assert_same(ours(ids).logits, want)
    cache = HybridCache(ours.config)
    parts = [ours(chunk, past_key_values=cache).logits for chunk in ids.split([20, 1, 1, 30, 11], dim=1)]
    assert_same(torch.cat(parts, dim=1), want)


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_left_padded_logits_and_generation(name: str) -> None:
    theirs = PAIRS[name]()
    ours, ids, mask = from_transformers(theirs), tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    for row, pads in enumerate((0, 20, 50)):
        mask[row, :pads] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    named = {} if "mamba" in name or "bloom" in name else {"position_ids": positions}
    want = theirs(ids, attention_mask=mask, **named).logits
    assert_same(ours(ids, attention_mask=mask).logits[mask == 1], want[mask == 1])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))


@torch.no_grad()
def test_mamba2_mixer_outputs_and_states() -> None:
    """The mixer by itself, with our cache beside theirs, token by token after a prefill."""
    theirs = PAIRS["mamba2_groups"]()
    ours = from_transformers(theirs)
    x = torch.randn(2, LENGTH, 32)
    for i in range(2):
        mixer, reference = ours.model.layers[i].mixers["mamba"], theirs.backbone.layers[i].mixer
        whole = reference(x)
        layer = HybridCache(ours.config).layers[i]
        positions, segments = Positions(torch.arange(LENGTH)[None].expand(2, -1), LENGTH), Segments()
        assert_same(mixer(x, positions, segments), whole)
        parts = [mixer(part, positions, segments, layer) for part in x.split([40] + [1] * 23, dim=1)]
        assert_same(torch.cat(parts, dim=1), whole)
        assert layer.ssm_state.shape == (2, 8, 8, 16) and layer.conv_state.shape == (2, 32 * 2 + 2 * 4 * 16, 2)


@torch.no_grad()
def test_mamba2_states_are_theirs() -> None:
    theirs = PAIRS["mamba2"]()
    ours, ids = from_transformers(theirs), tokens(2, LENGTH)
    cache = HybridCache(ours.config)
    ours(ids, past_key_values=cache)
    reference = theirs(ids, use_cache=True).cache_params
    for i, layer in enumerate(cache.layers):
        assert_same(layer.ssm_state, reference.get_recurrent_state(i, state_idx=0))
        assert_same(layer.conv_state, reference.get_conv_state(i, state_idx=0)[:, :, -3:])


@torch.no_grad()
def test_mamba2_limits_its_steps() -> None:
    """transformers forgets time_step_limit in one-token decoding, so whole forwards are compared."""
    theirs = mamba2(time_step_limit=(0.3, 0.9))
    ours, ids = from_transformers(theirs), tokens(2, LENGTH)
    assert_same(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_their_dtype_is_kept() -> None:
    ours = from_transformers(mamba2().to(torch.bfloat16))
    dtypes = {name: p.dtype for name, p in ours.named_parameters()}
    assert dtypes["model.layers.0.mixers.mamba.A_log"] == torch.float32
    assert {d for name, d in dtypes.items() if not name.endswith(("A_log", "dt_bias", ".D"))} == {torch.bfloat16}
    assert ours(tokens(1, 5)).logits.isfinite().all()


def test_converted_weights_are_copies_and_save(tmp_path) -> None:
    theirs = llama(tie_word_embeddings=True)
    ours = from_transformers(theirs)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    with torch.no_grad():
        theirs.model.embed_tokens.weight.zero_()
    assert ours.lm_head.weight.abs().sum() > 0
    ours.save_pretrained(tmp_path)
    ids = tokens(1, 9)
    assert torch.equal(HybridLanguageModel.from_pretrained(tmp_path)(ids).logits, ours(ids).logits)


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "scale_attn_by_inverse_layer_idx=True"),
        (lambda: gpt2(activation_function="tanh"), "activation 'tanh'"),
        (lambda: bloom(apply_residual_connection_post_layernorm=True), "apply_residual_connection_post_layernorm=True"),
        (lambda: falcon(alibi=True), "alibi=True"),
        (lambda: llama(rope_parameters={**YARN, "beta_fast": 16.0}), "beta_fast=16.0"),
        (lambda: mamba(use_bias=True), "use_bias=True"),
        (lambda: llama(hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
        (lambda: mamba2(use_bias=True), "use_bias=True"),
        (lambda: mamba2(hidden_act="gelu"), "hidden_act='gelu'"),
    ],
)
def test_what_we_do_not_have_is_refused(build, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        from_transformers(build())
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*PAIRS])
@torch.no_grad()
def test_there_and_back(name: str) -> None:
    theirs = PAIRS[name]()
    again = to_transformers(from_transformers(theirs), theirs.config.model_type)
    ids = tokens(2, LENGTH)
    assert type(again) is type(theirs)
    assert_same(again(ids).logits, theirs(ids).logits, 1e-6)


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_preset_of_ours_goes_there(name: str) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "mamba_head_dim": 8, "vocab_size": 61}
    ours = HybridLanguageModel(preset(name, **sizes)).eval()
    draw_weights(ours)
    ids = tokens(2, 20)
    theirs = to_transformers(ours, name)
    assert_same(theirs(ids).logits, ours(ids).logits)
    assert_same(from_transformers(theirs)(ids).logits, ours(ids).logits, 1e-6)


@pytest.mark.parametrize(
    ("ours", "name", "words"),
    [
        ("fusiontree", "llama", "llama has no norm_placement='post'"),
        ("gpt2", "llama", "llama has no norm_type='layer'"),
        ("bloom", "gpt2", "gpt2 has no"),
        ("llama", "mistral9", "model_type='mistral9' cannot be converted; there are llama, mistral, gpt2"),
        ("mamba", "mamba2", "mamba2 has no"),
    ],
)
def test_what_they_do_not_have_is_refused(ours: str, name: str, words: str) -> None:
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "mamba_head_dim": 8, "vocab_size": 9}
    with torch.device("meta"):
        model = HybridLanguageModel(preset(ours, **sizes))
    with pytest.raises(ConfigError, match=words) as error:
        to_transformers(model, name)
    assert "\n" not in str(error.value)


def test_another_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_type='fusiontree' cannot be converted; there are llama"):
        from_transformers(HybridLanguageModel(preset("llama", vocab_size=9, hidden_size=16, num_hidden_layers=1)))
