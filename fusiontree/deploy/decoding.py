"""One text, token after token, on a cache of its own that is at hand between any two tokens: what sessions need."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusiontree.deploy.sampling import NOT_FINITE, Draw, GenerationOptions, next_tokens
from fusiontree.errors import CheckpointError


class Decoding:
    """`ids` is the text so far, of which the cache `past` has seen the first `fed` tokens."""

    def __init__(self, model: Any, ids: list[int], past: Any = None, fed: int = 0) -> None:
        self.model = model
        self.ids = list(ids)
        self.past = past
        self.fed = fed

    @torch.no_grad()
    def next_logits(self) -> Tensor:
        """Feed what was not fed yet and return the logits (1, V) for the next token."""
        new = torch.tensor([self.ids[self.fed :]], device=self.model.device)
        out = self.model(input_ids=new, past_key_values=self.past, use_cache=True, logits_to_keep=1)
        self.past, self.fed = out.past_key_values, len(self.ids)
        return out.logits[:, -1]

    def tokens(
        self, options: GenerationOptions, seed: int, stop_ids: frozenset[int], prompt: int
    ) -> Iterator[int | None]:
        """Yield token after token; None, kept in `ids` as it came, where a stop id ends the text.

        The first `prompt` of `ids` were not generated.
        """
        for _ in range(options.max_new_tokens):
            (token,) = next_tokens(self.next_logits(), [Draw(self.ids, prompt, options, seed)])
            if token is None:
                raise CheckpointError(NOT_FINITE)
            self.ids.append(token)
            yield None if token in stop_ids else token
            if token in stop_ids:
                return
