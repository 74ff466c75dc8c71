"""Prefill, then token after token on the cache: the one loop behind generate, stream, chat and sessions."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusiontree.deploy.sampling import GenerationOptions, next_token


class Decoding:
    """Rows of token ids and the cache that has seen all but their last column(s); rows are left-padded to one length.

    `ids[row]` is the row's text without padding. `past` may be a cache that has seen the first `fed` columns.
    """

    def __init__(self, model: Any, rows: Sequence[Sequence[int]], pad_id: int = 0, past: Any = None, fed: int = 0):
        self.model = model
        self.ids = [list(row) for row in rows]
        self.past = past
        self.fed = fed
        length = max(len(row) for row in self.ids)
        self._padding = [length - len(row) for row in self.ids]
        self._pad_id = pad_id

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Feed the columns not yet seen and return the logits (B, V) for the next one."""
        padded = [[self._pad_id] * padding + row for padding, row in zip(self._padding, self.ids, strict=True)]
        device = self.model.device
        new = torch.tensor([row[self.fed :] for row in padded], device=device)
        out = self.model(
            input_ids=new,
            attention_mask=self._mask(len(padded[0])),
            past_key_values=self.past,
            use_cache=True,
            logits_to_keep=1,
        )
        self.past, self.fed = out.past_key_values, len(padded[0])
        return out.logits[:, -1]

    def _mask(self, length: int) -> Tensor | None:
        if not any(self._padding):
            return None
        columns = torch.arange(length)
        return (columns >= torch.tensor(self._padding)[:, None]).long().to(self.model.device)

    def tokens(self, options: GenerationOptions, seed: int, stop_ids: frozenset[int]) -> Iterator[list[int | None]]:
        """Yield each step's token per row, None for a row that has ended; row i draws with `seed + i`.

        The consumer ends a row early through `self.ended[row] = True`. A stop id is kept in `ids` and not yielded.
        """
        self.ended = [False] * len(self.ids)
        for _ in range(options.max_new_tokens):
            logits = self.next_logits()
            step: list[int | None] = []
            for row, ids in enumerate(self.ids):
                if self.ended[row]:
                    ids.append(self._pad_id)
                    step.append(None)
                    continue
                token = next_token(logits[row], ids, options, seed + row)
                ids.append(token)
                self.ended[row] = token in stop_ids
                step.append(None if self.ended[row] else token)
            yield step
            if all(self.ended):
                return
