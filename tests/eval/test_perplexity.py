import math

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fusiontree import HybridLanguageModel
from fusiontree.errors import DataError
from fusiontree.eval import evaluate_loss, token_byte_lengths, token_losses
from fusiontree.models.presets import preset


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).float()


def random_batch(rows: int, length: int, seed: int = 0) -> dict:
    ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids.clone()}


def test_equals_the_models_own_loss(model):
    batch = random_batch(2, 17)
    result = evaluate_loss(model, [batch])
    assert result.loss == pytest.approx(model(**batch).loss.item(), rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    assert (result.tokens, result.bytes, result.bits_per_byte) == (2 * 16, None, None)


def test_tokens_count_once_whatever_batch_they_stand_in(model):
    long, short = random_batch(3, 40), random_batch(1, 9, seed=1)
    short["labels"][:, :5] = -100
    together = evaluate_loss(model, [long, short])
    parts = [evaluate_loss(model, [batch]) for batch in (long, short)]
    expected = sum(part.loss * part.tokens for part in parts) / sum(part.tokens for part in parts)
    assert [part.tokens for part in parts] == [3 * 39, 4]
    assert together.loss == pytest.approx(expected, rel=1e-6)


def test_without_labels_padding_and_document_starts_are_not_scored(model):
    batch = random_batch(1, 8)
    del batch["labels"]
    batch["attention_mask"] = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])
    batch["position_ids"] = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    losses, targets = token_losses(model, batch)
    assert (targets != -100).tolist() == [[True, True, False, True, True, True, False]]
    assert bool((losses[targets == -100] == 0).all())


def test_a_packed_row_scores_like_our_models_own_loss():
    config = preset("fusiontree", vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
                    mamba_head_dim=16, mamba_d_state=8, sliding_window=4, gate_rank=4)  # fmt: skip
    ours = HybridLanguageModel(config)
    batch = random_batch(2, 12) | {"position_ids": torch.tensor([[*range(12)], [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]])}
    result = evaluate_loss(ours, [batch])
    assert result.tokens == 11 + 9
    ours.eval()
    assert result.loss == pytest.approx(ours(**batch).loss.item(), rel=1e-5)


def test_mode_and_gradients_are_restored_and_autocast_is_close(model):
    model.train()
    batch = random_batch(2, 16)
    exact = evaluate_loss(model, [batch]).loss
    assert model.training and torch.is_grad_enabled()
    assert evaluate_loss(model, [batch], autocast=torch.bfloat16).loss == pytest.approx(exact, rel=2e-2)


def test_max_batches(model):
    assert evaluate_loss(model, (random_batch(1, 9, seed) for seed in range(10)), max_batches=3).tokens == 24


@pytest.mark.parametrize("batches", [[], [{"input_ids": torch.ones(1, 4).long(), "labels": torch.full((1, 4), -100)}]])
def test_nothing_to_score_is_refused(model, batches):
    with pytest.raises(DataError, match="no token to score"):
        evaluate_loss(model, batches)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {character: index + 1 for index, character in enumerate(alphabet)} | {"<eos>": 0, "th": 257}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("t", "h")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def test_token_bytes_add_up_to_the_bytes_of_the_text():
    tokenizer = byte_tokenizer()
    lengths = token_byte_lengths(tokenizer)
    text = "the naïve 树 — thé\n\t"
    assert int(lengths[tokenizer(text).input_ids].sum()) == len(text.encode())
    assert (int(lengths[257]), int(lengths[0])) == (2, 0)


def test_bits_per_byte(model):
    lengths = torch.full((64,), 2)
    result = evaluate_loss(model, [random_batch(2, 11)], token_bytes=lengths)
    assert result.bytes == 2 * result.tokens
    assert result.bits_per_byte == pytest.approx(result.loss / math.log(2) / 2)


def test_a_tokenizer_without_fixed_bytes_is_refused():
    tokenizer = Tokenizer(models.WordLevel(vocab={"a": 0}, unk_token="a"))
    with pytest.raises(DataError, match="byte-level"):
        token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
