"""From an engine's events to OpenAI's JSON: whole answers and the chunks of streams, for completions and for chat."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from fusiontree.deploy.requests import ChoiceEnd, TokenEvent, Usage
from fusiontree.deploy.retrieval import Hit
from fusiontree.deploy.server.errors import ApiError
from fusiontree.deploy.server.models import Served
from fusiontree.deploy.server.schemas import ChatRequest, Sampling

Json = dict[str, Any]


class Answer:
    """The answer to one body: knows its id, its form and what each choice has said so far.

    `note` is told of each prompt's usage; `hits` are the passages it was given, None where none were looked for.
    """

    prefix: ClassVar[str] = "cmpl"
    kinds: ClassVar[tuple[str, str]] = ("text_completion", "text_completion")  # whole, chunk

    def __init__(
        self, model: Served, body: Sampling, note: Callable[[Usage], None], hits: Sequence[Hit] | None = None
    ) -> None:
        self.model = model
        self.body = body
        self.usages: list[Usage] = []
        self._note = note
        self._sources = {} if hits is None else {"sources": [hit.told() for hit in hits]}
        self.head = {"id": f"{self.prefix}-{secrets.token_hex(12)}", "created": int(time.time()), "model": model.name}
        self.head["system_fingerprint"] = model.runtime.fingerprint[:16]
        self._said: dict[int, int] = {}  # characters that each choice has written

    def spent(self, usage: Usage) -> None:
        """One prompt and its choices are done."""
        self.usages.append(usage)
        self._note(usage)

    def opening(self, choices: int) -> list[Json]:
        """The chunks before the first token."""
        return []

    def token(self, choice: int, event: TokenEvent) -> Json | None:
        """The chunk of one token; None when it has nothing to say yet."""
        if not event.text and not self._wants_every_token:
            return None
        return self.chunk([self._choice(choice, event.text, [event], None, chunk=True)])

    def end(self, choice: int, event: ChoiceEnd) -> Json:
        """The last chunk of a choice; ApiError when it did not end as it should."""
        reason = finish_reason(event)
        return self.chunk([self._choice(choice, event.text, [], reason, chunk=True)])

    def chunk(self, choices: list[Json], usage: Json | None = None) -> Json:
        """One event of a stream."""
        more = {"usage": usage} if self.tells_usage else {}
        sources, self._sources = self._sources, {}  # the first chunk brings them
        return {**self.head, "object": self.kinds[1], "choices": choices, **more, **sources}

    @property
    def tells_usage(self) -> bool:
        """Whether a stream ends with what it cost."""
        return bool(self.body.stream_options and self.body.stream_options.include_usage)

    def closing(self) -> list[Json]:
        """The chunks after the last token."""
        return [self.chunk([], total_usage(self.usages))] if self.tells_usage else []

    def whole(self, choices: Sequence[tuple[list[TokenEvent], ChoiceEnd]]) -> Json:
        """The whole answer; ApiError when a choice did not end as it should."""
        made = []
        for place, (tokens, end) in enumerate(choices):
            text = "".join(token.text for token in tokens) + end.text
            made.append(self._choice(place, text, tokens, finish_reason(end), chunk=False))
        return {
            **self.head,
            "object": self.kinds[0],
            "choices": made,
            "usage": total_usage(self.usages),
            **self._sources,
        }

    @property
    def _wants_every_token(self) -> bool:
        return bool(self.body.gates) or self._logprobs is not None

    @property
    def _logprobs(self) -> int | None:
        return getattr(self.body, "logprobs", None)

    def _choice(self, place: int, text: str, tokens: list[TokenEvent], reason: str | None, chunk: bool) -> Json:
        said = self._said.get(place, 0)
        self._said[place] = said + len(text)
        logprobs = self._logprobs_of(tokens, said) if tokens and self._logprobs is not None else None
        gates = {"gates": [self._gates(token) for token in tokens]} if self.body.gates else {}
        form = self._text(text, chunk)
        return {"index": place, **form, "logprobs": logprobs, "finish_reason": reason, **gates}

    def _text(self, text: str, chunk: bool) -> Json:
        return {"text": text}

    def _logprobs_of(self, tokens: list[TokenEvent], said: int) -> Json:
        offsets = []
        for token in tokens:
            offsets.append(said)
            said += len(token.text)
        return {
            "tokens": [self.spelled(token.token) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.spelled(i): value for i, value in token.top} for token in tokens],
            "text_offset": offsets,
        }

    def _gates(self, token: TokenEvent) -> Json:
        layers = [None if gate is None else round(gate, 4) for gate in token.gates or ()]
        return {"token": token.token, "text": token.text, "layers": layers}

    def spelled(self, token: int) -> str:
        """A token as text; part of a character shows as U+FFFD."""
        return self.model.runtime.tokenizer.decode([token], clean_up_tokenization_spaces=False)


class ChatAnswer(Answer):
    """The answer of /v1/chat/completions."""

    prefix = "chatcmpl"
    kinds = ("chat.completion", "chat.completion.chunk")

    def opening(self, choices: int) -> list[Json]:
        """Each choice begins with its role."""
        delta = {"delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        return [self.chunk([{"index": place, **delta}]) for place in range(choices)]

    @property
    def _logprobs(self) -> int | None:
        wanted = getattr(self.body, "logprobs", None)
        return 0 if wanted else None

    def _text(self, text: str, chunk: bool) -> Json:
        if not chunk:
            return {"message": {"role": "assistant", "content": text, "refusal": None}}
        return {"delta": {"content": text} if text else {}}

    def _logprobs_of(self, tokens: list[TokenEvent], said: int) -> Json:
        entries = [
            {**self._entry(token.token, token.logprob), "top_logprobs": [self._entry(*pair) for pair in token.top]}
            for token in tokens
        ]
        return {"content": entries, "refusal": None}

    def _entry(self, token: int, logprob: float | None) -> Json:
        text = self.spelled(token)
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode("utf-8"))}


def answer_to(
    model: Served, body: Sampling, note: Callable[[Usage], None], hits: Sequence[Hit] | None = None
) -> Answer:
    """The form of the answer that a body asks for."""
    return (ChatAnswer if isinstance(body, ChatRequest) else Answer)(model, body, note, hits)


def finish_reason(end: ChoiceEnd) -> str:
    """`stop` or `length`; ApiError for an end that is neither."""
    if end.reason in ("stop", "length"):
        return end.reason
    if end.reason == "deadline":
        why = end.error or "the request took too long"
        raise ApiError(504, f"No time is left: {why}.", kind="server_error", code="deadline_exceeded")
    why = end.error or "the server is shutting down"
    raise ApiError(503, f"The answer ended early: {why}.", kind="server_error", code="unavailable")


def total_usage(usages: Sequence[Usage]) -> Json:
    """OpenAI's `usage` of all the prompts of a body."""
    prompt, written = sum(u.prompt_tokens for u in usages), sum(u.completion_tokens for u in usages)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": prompt + written,
        "prompt_tokens_details": {"cached_tokens": sum(u.cached_tokens for u in usages)},
    }
