"""Lines about rows computed together, with and without padding: each is as it would be alone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig

from fusiontree.eval.subject import only_settings
from fusiontree.eval.verify.error import ModelFailedError, NotOfferedError, relative_error
from fusiontree.eval.verify.specimen import Specimen, fitted

NEW_TOKENS = 8
_STEPS = 12  # tokens read one by one behind a padded prompt


def batched(specimen: Specimen) -> float:
    """Eight rows at once."""
    return relative_error(specimen.whole(specimen.ids), torch.stack(specimen.alone(list(specimen.ids))))


def left_padded(specimen: Specimen) -> float:
    """Rows of unequal length, padded on the left, read at once."""
    return _padded_whole(specimen, left=True, told=True)


def right_padded(specimen: Specimen) -> float:
    """Rows of unequal length, padded on the right, read at once."""
    return _padded_whole(specimen, left=False, told=True)


def padded_positions_left_out(specimen: Specimen) -> float:
    """Padded on the left without position ids: the model has to make them of the mask."""
    specimen.needs("position_ids")
    return _padded_whole(specimen, left=True, told=False)


def left_padded_cached(specimen: Specimen) -> float:
    """A padded prompt, then token by token."""
    prompt = specimen.length - _steps(specimen)
    return _padded_feed(specimen, fitted([prompt] + [1] * specimen.length, specimen.length))


def left_padded_chunked(specimen: Specimen) -> float:
    """A padded prompt in pieces, some of which are all padding for some rows."""
    piece = max(2, specimen.length // 5)
    return _padded_feed(specimen, fitted([piece] * 3, specimen.length))


def generation(specimen: Specimen) -> float:
    """`generate` on a padded batch: how much less probable its tokens are, by the logits of the row alone, than the
    most probable ones, relative to the largest logit."""
    specimen.needs("attention_mask")
    texts = _texts(specimen)
    ids, mask = _laid_out(specimen, texts, left=True)
    written = _generate(specimen, ids, mask)[:, specimen.length :]
    worst = 0.0
    for text, answer in zip(texts, written, strict=True):
        logits = specimen.whole(torch.cat([text, answer])[None])[0, len(text) - 1 : -1].double()
        chosen = logits.gather(-1, answer[:, None])[:, 0]
        worst = max(worst, ((logits.amax(-1) - chosen).max() / logits.abs().max().clamp_min(1e-30)).item())
    return worst


def _generate(specimen: Specimen, ids: Tensor, mask: Tensor) -> Tensor:
    settings = GenerationConfig(
        do_sample=False, num_beams=1, max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0, use_cache=True
    )
    try:
        with only_settings(specimen.model, settings):
            written: Tensor = specimen.model.generate(ids, attention_mask=mask, generation_config=settings)
    except Exception as error:  # whatever a model of someone else's raises is a finding about it
        raise ModelFailedError(f"generate fails: {type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    return written


def _steps(specimen: Specimen) -> int:
    return min(_STEPS, specimen.length // 3)


def _texts(specimen: Specimen) -> list[Tensor]:
    """Rows of unequal length; the shortest still has a token before the steps of `left_padded_cached`."""
    length = specimen.length
    lengths = (length, length - 1, length // 2, _steps(specimen) + 1)
    return [row[:n] for row, n in zip(specimen.ids, lengths, strict=False)]


def _laid_out(specimen: Specimen, texts: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """ids (B, L) with other tokens where there is padding, and the mask."""
    slot = torch.arange(specimen.length, device=specimen.device)
    lengths = torch.tensor([len(text) for text in texts], device=specimen.device)[:, None]
    mask = (slot >= specimen.length - lengths) if left else (slot < lengths)
    ids = specimen.other(specimen.ids[: len(texts)].flip(1))
    ids[mask] = torch.cat(list(texts))
    return ids, mask.long()


def _padded_whole(specimen: Specimen, left: bool, told: bool) -> float:
    specimen.needs("attention_mask")
    texts = _texts(specimen)
    ids, mask = _laid_out(specimen, texts, left)
    positions = specimen.positions(ids, mask) if told else None
    given = {} if positions is None else {"position_ids": positions}
    return _compared(specimen, specimen.whole(ids, attention_mask=mask, **given), mask, texts)


def _padded_feed(specimen: Specimen, sizes: Sequence[int]) -> float:
    specimen.needs("attention_mask")
    if len(sizes) < 2:
        raise NotOfferedError("the text is too short to be cut")
    texts = _texts(specimen)
    ids, mask = _laid_out(specimen, texts, left=True)
    return _compared(specimen, specimen.feed(ids, sizes, mask=mask)[0], mask, texts)


def _compared(specimen: Specimen, logits: Tensor, mask: Tensor, texts: Sequence[Tensor]) -> float:
    wanted = specimen.alone(texts)
    return max(relative_error(logits[row, mask[row] == 1], want) for row, want in enumerate(wanted))
