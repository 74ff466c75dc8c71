"""From messages to the text a model continues: the tokenizer's chat template, or a plain dialogue."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fusiontree.errors import CheckpointError, ConfigError
from fusiontree.models.json_files import one_line

DEFAULT_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ message['content'] }}\n\n"
    "{% else %}{{ message['role'] | capitalize }}: {{ message['content'] }}\n{% endif %}"
    "{% endfor %}Assistant:"
)
DEFAULT_CHAT_STOP = "\nUser:"
ROLES = ("system", "user", "assistant")


def chat_text(tokenizer: Any, messages: Sequence[Mapping[str, str]]) -> str:
    """What the assistant is to continue. ConfigError for malformed messages, CheckpointError for a bad template."""
    for place, message in enumerate(messages):
        if not (_is_message(message) and message["role"] in ROLES):
            raise ConfigError(f"messages[{place}]: needs a role ({', '.join(ROLES)}) and a content that is text")
    if not messages:
        raise ConfigError("messages: give at least one")
    try:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            chat_template=tokenizer.chat_template or DEFAULT_CHAT_TEMPLATE,
            tokenize=False,
            add_generation_prompt=True,
        )
    except Exception as problem:  # a template is a program of the folder's author: anything may go wrong in it
        where = f"{tokenizer.name_or_path}: the chat template"
        raise CheckpointError(f"{where} cannot be used: {one_line(problem)}") from None
    return text


def opening(messages: Sequence[Mapping[str, str]]) -> list[dict[str, str]] | None:
    """Messages that begin as these do and differ after the system prompt; None where there is none."""
    if len(messages) < 2 or messages[0]["role"] != "system":
        return None
    return [dict(messages[0]), {"role": "user", "content": "…"}]


def common_length(a: Sequence[int], b: Sequence[int]) -> int:
    """How many of the first elements are the same."""
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _is_message(message: object) -> bool:
    return isinstance(message, Mapping) and all(isinstance(message.get(key), str) for key in ("role", "content"))
