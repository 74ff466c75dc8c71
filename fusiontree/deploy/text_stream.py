"""Tokens in, text out: only whole characters, and nothing of a stop string."""

from collections.abc import Sequence
from typing import Any

BROKEN = "\ufffd"
LONGEST_HOLD = 3  # a UTF-8 character has at most 4 bytes, so at most 3 can be waiting for the rest
WINDOW = 8  # tokens before the new ones that are decoded with them, so that spaces and merges come out right


class TextStream:
    """Decodes the tokens of one text as they come.

    `ids` is the text so far (prompt included), of which the text of the first `read` tokens and `emitted` characters
    after them were given out already. Characters whose last bytes have not come yet are held back.
    """

    def __init__(
        self, tokenizer: Any, ids: Sequence[int], stops: tuple[str, ...] = (), read: int | None = None, emitted: int = 0
    ):
        self.tokenizer = tokenizer
        self.ids = list(ids)
        self.stops = stops
        self.read = len(self.ids) if read is None else read
        self.emitted = emitted
        self.stopped = False
        self._held = ""  # whole characters that may begin a stop string

    def push(self, token: int) -> str:
        """The text that is certain after one more token; may be empty."""
        self.ids.append(token)
        text = self._held + self._new_characters()
        return self._up_to_stop(text)

    def finish(self) -> str:
        """What was held back in case a stop string followed; an unfinished character is not given out."""
        rest, self._held = self._held, ""
        return rest

    def _new_characters(self) -> str:
        start = max(0, self.read - WINDOW)
        known = len(self._decode(self.ids[start : self.read]))
        text = self._decode(self.ids[start:])[known:]
        stable = max(len(text.rstrip(BROKEN)), len(text) - LONGEST_HOLD)
        piece = text[self.emitted : stable]
        if stable == len(text):
            self.read, self.emitted = len(self.ids), 0
        else:
            self.emitted = max(self.emitted, stable)
        return piece

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _up_to_stop(self, text: str) -> str:
        found = [place for stop in self.stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        hold = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - hold :]
        return text[: len(text) - hold]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
