"""When an answer ends: at an end token, or before the first of some strings."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from fusiontree.eval.task import TokenText


class Stops(StoppingCriteria):
    """Tells `generate` which rows hold one of `stop`; afterwards gives each row's text, cut before it.

    Rows are (prompt + new tokens); a row's answer begins at `prompt_length`.
    """

    def __init__(
        self, text: TokenText, stop: Sequence[str], end_ids: frozenset[int], *, prompt_length: int, rows: int
    ) -> None:
        self.text = text
        self.stop = [each for each in stop if each]
        self.end_ids = end_ids
        self.prompt_length = prompt_length
        self.done = [False] * rows
        # A character is at most four bytes, and a token at least one.
        self.tail = max((len(each.encode()) for each in self.stop), default=0) + 8

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        if self.stop:
            answers = input_ids[:, self.prompt_length :].tolist()
            for row, answer in enumerate(answers):
                self.done[row] = self.done[row] or self._stopped(answer)
        return torch.tensor(self.done, device=input_ids.device)

    def _stopped(self, answer: list[int]) -> bool:
        # The end of the answer is looked at first: the whole is decoded only where that holds a stop.
        return self._holds_stop(answer[-self.tail :]) and self._holds_stop(answer)

    def _holds_stop(self, ids: list[int]) -> bool:
        decoded = self.text.decode(ids)
        return any(each in decoded for each in self.stop)

    def texts(self, output: Tensor) -> list[str]:
        """The answers of rows (B, prompt + new)."""
        return [self._answer(row) for row in output[:, self.prompt_length :].tolist()]

    def _answer(self, ids: list[int]) -> str:
        ends = [place for place, token in enumerate(ids) if token in self.end_ids]
        return cut_before(self.text.decode(ids[: ends[0]] if ends else ids), self.stop)


def cut_before(text: str, stop: Sequence[str]) -> str:
    """The text before the first of the stops, all of it when none is in it."""
    return text[: min((place for each in stop if each and (place := text.find(each)) >= 0), default=len(text))]
