"""A causal language model under examination, fed as `generate` feeds it. Shapes: B rows, L tokens, V vocabulary."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fusiontree.eval.verify.error import ModelFailedError, NotOfferedError

Cut = Callable[[Any, Any], Any]  # model and layer → branch: a new model without those branches

_REFUSALS = (ValueError, NotImplementedError)


class Specimen:
    """`model` in evaluation mode, and `ids` (8, L) to try it on, on its device.

    `cut` makes a smaller model of ours without the branches named; None where that is not to be examined.
    """

    def __init__(self, model: Any, ids: Tensor, cut: Cut | None = None) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device
        self.ids = ids.to(self.device)
        self.length = ids.shape[1]
        self.cut = cut
        self.takes = frozenset(inspect.signature(model.forward).parameters)
        self.vocab_size: int = model.get_input_embeddings().num_embeddings
        # transformers' Mamba models have a name of their own for it.
        self.cache_name = "cache_params" if "cache_params" in self.takes else "past_key_values"

    def needs(self, *names: str) -> None:
        """NotOfferedError when the model's forward has no such argument."""
        for name in names:
            if name not in self.takes:
                raise NotOfferedError(f"takes no {name}")

    @torch.no_grad()
    def call(self, **given: Any) -> Any:
        """The model's output. What it refuses is NotOfferedError, what it breaks at ModelFailedError."""
        try:
            return self.model(**given)
        except _REFUSALS as error:
            raise NotOfferedError(f"refused: {_first_line(error)}") from error
        except Exception as error:  # whatever a model of someone else's raises is a finding about it
            raise ModelFailedError(f"fails: {_first_line(error)}") from error

    def whole(self, ids: Tensor, **given: Any) -> Tensor:
        """Logits (B, L, V) of ids read at once, with nothing cached."""
        logits: Tensor = self.call(input_ids=ids, use_cache=False, **given).logits
        return logits

    def alone(self, texts: Sequence[Tensor]) -> list[Tensor]:
        """Logits (L, V) of each text (L,) read by itself."""
        return [self.whole(text[None])[0] for text in texts]

    def feed(
        self,
        ids: Tensor,
        sizes: Sequence[int],
        cache: Any = None,
        mask: Tensor | None = None,
        told: bool = True,
        seen: int = 0,
    ) -> tuple[Tensor, Any]:
        """Logits of ids read in pieces, one after another on one cache, and that cache; `seen` tokens are in it.

        `mask` (B, L) is 0 at padding. `told`: position ids are handed in, as `generate` does where they are taken.
        """  # fmt: skip
        positions = self.positions(ids, mask, seen) if told else None
        parts = []
        for begin, end in spans(sizes):
            given = {self.cache_name: cache, "use_cache": True}
            if mask is not None:
                # A cache of states alone asks for the mask of the new tokens, one of keys for that of all.
                given["attention_mask"] = mask[:, begin if self.cache_name == "cache_params" else 0 : end]
            if positions is not None:
                given["position_ids"] = positions[:, begin:end]
            out = self.call(input_ids=ids[:, begin:end], **given)
            cache = out.get(self.cache_name)
            if cache is None:
                raise NotOfferedError("returns no cache")
            parts.append(out.logits)
        return torch.cat(parts, dim=1), cache

    def positions(self, ids: Tensor, mask: Tensor | None, seen: int = 0) -> Tensor | None:
        """Position ids (B, L) as `generate` makes them: counted over real tokens; None where none are taken."""
        if "position_ids" not in self.takes:
            return None
        if mask is not None:
            return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)
        return (torch.arange(ids.shape[1], device=ids.device) + seen)[None].expand(ids.shape)

    def other(self, ids: Tensor, shift: int = 1) -> Tensor:
        """Tokens of the same shape, every one of them another than in `ids`."""
        return (ids + shift) % self.vocab_size

    def fork(self, cache: Any) -> Any:
        """A copy of a cache that goes its own way."""
        return cache.fork() if hasattr(cache, "fork") else copy.deepcopy(cache)


def spans(sizes: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(begin, end) of pieces of these sizes, one behind the other."""
    at = 0
    for size in sizes:
        yield at, at + size
        at += size


def chunkings(length: int) -> list[list[int]]:
    """Some ways to read so many tokens in pieces: even, odd, one at a time between, a short and a long beginning."""
    seventh, third = max(1, length // 7), max(1, length // 3)
    ways = [
        [seventh] * (length // seventh),
        [1, length - 1],
        [length - 1, 1],
        [third, 1, 1, 5, third],
        [6, 4, 5, 2, 1],
    ]
    return [fitted(sizes, length) for sizes in ways]


def fitted(sizes: Sequence[int], length: int) -> list[int]:
    """These sizes, cut or filled up by one more piece so that they are `length` in all."""
    kept: list[int] = []
    for size in sizes:
        kept.append(min(size, length - sum(kept)))
    return [size for size in (*kept, length - sum(kept)) if size > 0]


def _first_line(error: Exception) -> str:
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    said = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return said if len(said) <= 160 else said[:159] + "…"
