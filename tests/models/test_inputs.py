"""Wrong input is one clear line; the ways a model is handled around `forward` keep what matters."""

import copy
import pickle

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from fusiontree.models import HybridCache, HybridLanguageModel
from tests.models.kinds import assert_same, build, config_of, shared_model, tokens

IDS = tokens(2, 9)
WRONG = {
    "nothing": ({}, "exactly one"),
    "both": ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 9, 32)}, "exactly one"),
    "no token": ({"input_ids": IDS[:, :0]}, r"at least one token, not \(2, 0\)"),
    "one dimension": ({"input_ids": IDS[0]}, r"input_ids must be \(batch, length\)"),
    "flat embeddings": ({"inputs_embeds": torch.zeros(9, 32)}, r"inputs_embeds must be \(batch, length, hidden\)"),
    "mask of scores": ({"input_ids": IDS, "attention_mask": torch.ones(2, 1, 9, 9)}, "attention_mask must be"),
    "short mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 8)}, "attention_mask must be"),
    "long mask": ({"input_ids": IDS, "attention_mask": torch.ones(2, 10)}, "attention_mask must be"),
    "mask of other rows": ({"input_ids": IDS, "attention_mask": torch.zeros(3, 9)}, "attention_mask must be"),
    "broken positions": ({"input_ids": IDS, "position_ids": torch.arange(9.0)[None]}, "whole numbers"),
    "switches": ({"input_ids": IDS, "seq_idx": torch.ones(2, 9, dtype=torch.bool)}, "whole numbers"),
    "negative positions": ({"input_ids": IDS, "position_ids": torch.arange(9)[None] - 4}, "smallest is -4"),
    "few positions": ({"input_ids": IDS, "position_ids": torch.arange(8)[None]}, r"position_ids must be \(2, 9\)"),
    "three axes": ({"input_ids": IDS, "position_ids": torch.arange(9).expand(3, 2, 9)}, "position_ids must be"),
    "few labels": ({"input_ids": IDS, "labels": IDS[:, 1:]}, "labels must be"),
    "labels, few logits": ({"input_ids": IDS, "labels": IDS, "logits_to_keep": 1}, "leave logits_to_keep out"),
    "attention weights": ({"input_ids": IDS, "output_attentions": True}, "output_attentions"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input_is_refused(name: str) -> None:
    arguments, words = WRONG[name]
    with pytest.raises(ValueError, match=words) as error:
        shared_model("post")(**arguments)
    assert "\n" not in str(error.value)


@torch.no_grad()
def test_one_description_may_serve_all_rows() -> None:
    model = shared_model("post")
    positions = torch.cat([torch.arange(4), torch.arange(5)])
    want = model(IDS, position_ids=positions.expand(2, 9)).logits
    assert torch.equal(model(IDS, position_ids=positions[None]).logits, want)
    assert torch.equal(model(IDS, position_ids=positions).logits, want)
    mask = torch.tensor([[0, 0] + [1] * 7])
    assert torch.equal(model(IDS, attention_mask=mask).logits, model(IDS, attention_mask=mask.expand(2, 9)).logits)
    assert model(IDS[:0]).logits.shape == (0, 9, 61)


def test_a_cache_of_another_model_or_batch_is_refused() -> None:
    model = shared_model("post")
    with pytest.raises(ValueError, match="2 layers, the model 5"), torch.no_grad():
        shared_model("mixed")(IDS, past_key_values=HybridCache(model.config))
    cache = HybridCache(model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache)
        with pytest.raises(ValueError, match="holds 2 rows, the input has 1"):
            model(IDS[:1], past_key_values=cache)


@torch.no_grad()
def test_caches_named_for_generation() -> None:
    model, quiet = shared_model("post"), {"max_new_tokens": 3, "do_sample": False, "pad_token_id": 0}
    want = model.generate(IDS, **quiet)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=20)):
        assert torch.equal(model.generate(IDS, past_key_values=cache, **quiet), want)
    assert torch.equal(model.generate(IDS, cache_implementation="dynamic", **quiet), want)
    assert torch.equal(model.generate(IDS, prefill_chunk_size=4, **quiet), want)
    with pytest.raises(ValueError, match="cache_implementation='quantized'"):
        model.generate(IDS, cache_implementation="quantized", **quiet)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])  # noqa: S301
def test_copies_keep_the_marks_for_the_optimizer(copied) -> None:
    model = build("post")  # its own: hooks that other tests leave cannot be pickled
    again = copied(model)
    assert_same(again(IDS).logits, model(IDS).logits, 1e-6)  # memory laid out otherwise may round otherwise
    for (name, ours), theirs in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(ours, theirs), name
        marks = (getattr(p, "_no_weight_decay", False) for p in (ours, theirs))
        assert len(set(marks)) == 1, name


def test_state_space_parameters_are_fp32_in_a_bf16_model() -> None:
    model = AutoModelForCausalLM.from_config(config_of("post"), dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    assert exact == {name for name in dtypes if name.endswith(("A_log", "dt_bias", "mamba.D"))}
    assert model(IDS).logits.dtype == torch.bfloat16


def test_a_model_without_memory_gives_shapes() -> None:
    with torch.device("meta"):
        model = HybridLanguageModel(config_of("mixed"))
    out = model(IDS.to("meta"), labels=IDS.to("meta"))
    assert out.logits.shape == (2, 9, 61) and out.loss.shape == ()


def test_recomputation_leaves_a_cache_alone() -> None:
    """A long text read in chunks on one cache, in training: the cache is written once per chunk."""
    model = build("mixed").train()
    ids = tokens(2, 23)

    def run() -> tuple[torch.Tensor, int]:
        cache = HybridCache(model.config)
        loss = sum(model(part, past_key_values=cache).logits.square().mean() for part in ids.split([9, 14], dim=1))
        model.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()]), cache.get_seq_length()

    want, length = run()
    model.gradient_checkpointing_enable()
    again, length_again = run()
    assert length == length_again == 23
    assert_same(again, want)
