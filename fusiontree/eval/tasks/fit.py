"""Prompts brought to the length a model takes: from the middle, and the check that a whole prompt fits."""

from __future__ import annotations

from collections.abc import Callable

from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.task import TaskSettings, TokenText


def room_for(text: TokenText, max_new_tokens: int) -> int:
    """Tokens left for the prompt. DataError when there are none."""
    room = text.max_length - max_new_tokens
    if room < 1:
        raise DataError(f"the answer may take {max_new_tokens} tokens, the model sees no more than {text.max_length}")
    return room


def prompt_limit(settings: TaskSettings, room: int) -> int:
    """Tokens a prompt may have before it is cut: the option `prompt_tokens`, else all the room there is."""
    said = settings.options.get("prompt_tokens")
    if said is None:
        return room
    if not said.isdigit() or not 2 <= int(said) <= room:
        raise ConfigError(f"--option prompt_tokens={said}: allowed: 2 to {room}, what the model sees less the answer")
    return int(said)


def without_middle(text: TokenText, prompt: str, limit: int) -> str:
    """LongBench's cut: of a prompt longer than `limit` tokens, half as many from each end, made text and joined."""
    ids = text.encode(prompt, special=True)
    if len(ids) <= limit:
        return prompt
    half = limit // 2
    return text.decode(ids[:half]) + text.decode(ids[len(ids) - half :])


def without_start(text: TokenText, prompt: str, limit: int) -> str:
    """The last `limit` tokens of a longer prompt, made text."""
    ids = text.encode(prompt)
    return prompt if len(ids) <= limit else text.decode(ids[len(ids) - limit :])


def shortened(text: TokenText, cut: Callable[[int], str], limit: int, room: int, chat: bool) -> str:
    """`cut(limit)`, with a smaller limit while what the model sees of it is longer than the room.

    Text made of tokens may have more tokens when it is read again, and a chat template adds its own.
    """
    while True:
        prompt = cut(limit)
        over = text.count(text.chat(prompt) if chat else prompt) - room
        if over <= 0:
            return prompt
        if limit <= 1:
            raise DataError(f"a prompt does not fit into {room} tokens however much of its document is left out")
        limit = max(limit - over, limit // 2)  # the first for a fixed addition, the second where text grows with it
