"""How well a causal language model predicts text. Shapes: B batch, L tokens, V vocabulary."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fusiontree.errors import DataError

IGNORED_LABEL = -100
MODEL_INPUTS = ("input_ids", "attention_mask", "position_ids", "seq_idx")
# fp32 logits of 2048 tokens at V = 64K are 512 MB: a bound that is independent of batch and length.
ROWS_PER_CHUNK = 2048


@dataclass(frozen=True)
class LossResult:
    """`loss` in nats per predicted token; `bits_per_byte` is None where the bytes of the tokens were not given."""

    loss: float
    perplexity: float
    tokens: int
    bits_per_byte: float | None = None
    bytes: int | None = None


@contextlib.contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Switch dropout and gradients off for a while, then restore the mode the model was in.

    `no_grad`, not `inference_mode`: position tables grown in here must stay usable when training goes on.
    """
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


def targets_of(batch: Mapping[str, Any]) -> Tensor:
    """The labels (B, L) of a batch, unshifted, -100 where nothing is scored.

    The first token of a document (position 0) has nothing to be predicted from. Without `labels` every other token
    but padding counts.
    """
    if batch.get("labels") is not None:
        labels = batch["labels"].clone()
    else:
        labels = batch["input_ids"].clone()
        if batch.get("attention_mask") is not None:
            labels[batch["attention_mask"] == 0] = IGNORED_LABEL
    if batch.get("position_ids") is not None:
        labels[batch["position_ids"] == 0] = IGNORED_LABEL
    return labels


def token_losses(model: nn.Module, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    """Cross entropy of each prediction, fp32 (B, L-1), 0 where not scored, and its targets (B, L-1), -100 there."""
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in MODEL_INPUTS if batch.get(name) is not None}
    logits = model(**inputs, use_cache=False).logits[:, :-1]
    targets = targets_of(batch)[:, 1:].to(device)
    rows, flat = logits.flatten(0, 1), targets.flatten()
    pieces = [
        F.cross_entropy(some.float(), goal, ignore_index=IGNORED_LABEL, reduction="none")
        for some, goal in zip(rows.split(ROWS_PER_CHUNK), flat.split(ROWS_PER_CHUNK), strict=True)
    ]
    return torch.cat(pieces).view_as(targets), targets


def evaluate_loss(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    token_bytes: Tensor | None = None,
    autocast: torch.dtype | None = None,
    max_batches: int | None = None,
) -> LossResult:
    """Mean loss per predicted token over `batches`, each token counted once whatever the batch it stands in.

    Works with any Hugging Face causal model. `token_bytes` (V,) gives bits per byte (see `token_byte_lengths`);
    `autocast` computes in that type. Raises DataError when there is no token to score.
    """
    # Sums stay on the device: one transfer at the end, none per batch.
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64, device=device)
    tokens, scored_bytes = torch.zeros((2,), dtype=torch.int64, device=device).unbind()
    table = None if token_bytes is None else token_bytes.to(device)
    with evaluation_mode(model), torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
        for index, batch in enumerate(batches):
            if index == max_batches:
                break
            losses, targets = token_losses(model, batch)
            total += losses.sum(dtype=torch.float64)
            tokens += (targets != IGNORED_LABEL).sum()
            if table is not None:
                scored_bytes += table[targets[targets != IGNORED_LABEL]].sum()
    return _summary(total.item(), int(tokens), None if table is None else int(scored_bytes))


def _summary(total: float, tokens: int, scored_bytes: int | None) -> LossResult:
    if tokens == 0:
        raise DataError("evaluation data: no token to score (every label is -100, or there is no batch)")
    loss = total / tokens
    perplexity = math.exp(loss) if loss < 700 else math.inf  # exp overflows a double past 709
    bits_per_byte = total / math.log(2) / scored_bytes if scored_bytes else None
    return LossResult(loss, perplexity, tokens, bits_per_byte, scored_bytes)


def token_byte_lengths(tokenizer: Any) -> Tensor:
    """UTF-8 bytes of each token (V,) of a fast byte-level or byte-fallback tokenizer; special tokens are 0.

    Raises DataError for a tokenizer whose tokens do not stand for a fixed number of bytes.
    """
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    byte_level = '"ByteLevel"' in json.dumps([description.get("pre_tokenizer"), description.get("decoder")])
    if not byte_level and not description["model"].get("byte_fallback"):
        raise DataError("tokenizer: bytes per token are known for byte-level and byte-fallback tokenizers only")
    special = set(tokenizer.all_special_tokens)
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    lengths = torch.zeros(len(tokenizer), dtype=torch.int64)
    for token, index in tokenizer.get_vocab().items():
        if token not in special:
            lengths[index] = _token_bytes(token, byte_level and token not in added)
    return lengths


def _token_bytes(token: str, byte_level: bool) -> int:
    if byte_level:
        return len(token)  # the byte-level alphabet writes each byte as one character
    if len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
        return 1
    return len(token.replace("▁", " ").encode())
