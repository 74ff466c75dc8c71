"""Against code we did not write: transformers' Llama, Mistral and Mamba-2 with the same weights."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)

from fusiontree.errors import ConfigError
from fusiontree.models import HybridCache, HybridLanguageModel, from_llama, from_mamba2
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


def drawn(model: PreTrainedModel) -> PreTrainedModel:
    draw_weights(model)
    return model.eval()


PAIRS = {
    "llama": lambda: llama(),
    "llama_gqa": lambda: llama(num_key_value_heads=2, tie_word_embeddings=True, rms_norm_eps=1e-3),
    "llama_mqa": lambda: llama(num_key_value_heads=1, head_dim=16),
    "llama_rope": lambda: llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    "llama_stretched": lambda: llama(rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 500.0}),
    "mistral": lambda: mistral(num_key_value_heads=2),
    "mistral_wide": lambda: mistral(num_key_value_heads=4, sliding_window=64),
    "mistral_one": lambda: mistral(num_key_value_heads=1, sliding_window=2),
    "mamba2": lambda: mamba2(),
    "mamba2_groups": lambda: mamba2(n_groups=4, conv_kernel=3, layer_norm_epsilon=1e-3),
    "mamba2_tied": lambda: mamba2(tie_word_embeddings=True, use_conv_bias=False, expand=4, num_heads=16),
}


def converted(theirs: PreTrainedModel) -> HybridLanguageModel:
    return from_mamba2(theirs) if theirs.config.model_type == "mamba2" else from_llama(theirs)


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_logits(name: str) -> None:
    theirs = PAIRS[name]()
    ours, ids = converted(theirs), tokens(3, LENGTH)
    want = theirs(ids).logits
    assert_same(ours(ids).logits, want)
    cache = HybridCache(ours.config)
    parts = [ours(chunk, past_key_values=cache).logits for chunk in ids.split([20, 1, 1, 30, 11], dim=1)]
    assert_same(torch.cat(parts, dim=1), want)


@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_left_padded_logits_and_generation(name: str) -> None:
    theirs = PAIRS[name]()
    ours, ids, mask = converted(theirs), tokens(3, LENGTH), torch.ones(3, LENGTH, dtype=torch.long)
    for row, pads in enumerate((0, 20, 50)):
        mask[row, :pads] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    named = {} if "mamba" in name else {"position_ids": positions}
    want = theirs(ids, attention_mask=mask, **named).logits
    assert_same(ours(ids, attention_mask=mask).logits[mask == 1], want[mask == 1])
    settings = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(ours.generate(ids, **settings), theirs.generate(ids, **settings))


@torch.no_grad()
def test_mamba2_mixer_outputs_and_states() -> None:
    """The mixer by itself, with our cache beside theirs, token by token after a prefill."""
    theirs = PAIRS["mamba2_groups"]()
    ours = from_mamba2(theirs)
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
    ours, ids = from_mamba2(theirs), tokens(2, LENGTH)
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
    ours, ids = from_mamba2(theirs), tokens(2, LENGTH)
    assert_same(ours(ids).logits, theirs(ids).logits)


@torch.no_grad()
def test_their_dtype_is_kept() -> None:
    ours = from_mamba2(mamba2().to(torch.bfloat16))
    dtypes = {name: p.dtype for name, p in ours.named_parameters()}
    assert dtypes["model.layers.0.mixers.mamba.A_log"] == torch.float32
    assert {d for name, d in dtypes.items() if not name.endswith(("A_log", "dt_bias", ".D"))} == {torch.bfloat16}
    assert ours(tokens(1, 5)).logits.isfinite().all()


def test_converted_weights_are_copies_and_save(tmp_path) -> None:
    theirs = llama(tie_word_embeddings=True)
    ours = from_llama(theirs)
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
        (lambda: llama(attention_bias=True), "attention_bias=True"),
        (lambda: llama(mlp_bias=True), "mlp_bias=True"),
        (lambda: llama(hidden_act="gelu"), "hidden_act='gelu'"),
        (lambda: llama(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}), "'dynamic'"),
        (lambda: mamba2(use_bias=True), "use_bias=True"),
        (lambda: mamba2(hidden_act="gelu"), "hidden_act='gelu'"),
    ],
)
def test_what_we_do_not_have_is_refused(build, words: str) -> None:
    with pytest.raises(ConfigError, match=words) as error:
        converted(build())
    assert "\n" not in str(error.value)


def test_the_wrong_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="model_type='mamba2'"):
        from_llama(mamba2())
    with pytest.raises(ConfigError, match="model_type='llama'"):
        from_mamba2(llama())
