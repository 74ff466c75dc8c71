"""The models a server offers by name, and a request's way into their engines."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

from fusiontree.deploy.requests import Request, ServingEngine
from fusiontree.deploy.retrieval import Hit, Index, before_prompt, before_question
from fusiontree.deploy.sampling import GenerationOptions
from fusiontree.deploy.scheduler_ticket import Ticket
from fusiontree.deploy.server.errors import ApiError
from fusiontree.deploy.server.schemas import ChatRequest, CompletionRequest, Sampling
from fusiontree.deploy.server.settings import ServerSettings
from fusiontree.errors import ConfigError
from fusiontree.models.accounting import account

ANSWER_TOKENS = 256  # room that passages leave for an answer in a chat that does not say how long it may be
COMPLETION_TOKENS = 16  # what OpenAI's completions write when nothing is said; chat goes on as far as there is room


class Runtime(Protocol):
    """What the server needs of an `InferenceRuntime`."""

    model: Any
    tokenizer: Any
    fingerprint: str
    max_length: int

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def chat_request(
        self, messages: Sequence[Mapping[str, str]], options: GenerationOptions | None = None, **fields: Any
    ) -> Request:
        """The request for the answer to a conversation, its prompt as token ids."""
        ...


@dataclass(frozen=True)
class Served:
    """One model and what runs it."""

    name: str
    runtime: Runtime
    engine: ServingEngine
    created: int = field(default_factory=lambda: int(time.time()))

    def card(self) -> dict[str, Any]:
        """What /v1/models says of it; everything below `owned_by` is our own."""
        config = self.runtime.model.config
        weight = next(self.runtime.model.parameters())
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "fusiontree",
            "max_model_len": self.runtime.max_length,
            "parameters": account(config, length=1).total_parameters,
            "dtype": str(weight.dtype).removeprefix("torch."),
            "device": str(weight.device),
            "chat_template": bool(self.runtime.tokenizer.chat_template),
            "layers": [list(spec.mixers) for spec in config.layer_specs],
        }


class Submitted(NamedTuple):
    """What became of a body: a ticket per prompt, and the passages put before them (None: nothing was looked for)."""

    model: Served
    tickets: list[Ticket]
    hits: list[Hit] | None


class Models:
    """All models of a server; the first is the one the page begins with. `index`: what every prompt is helped by."""

    def __init__(self, served: Sequence[Served], settings: ServerSettings, index: Index | None = None) -> None:
        self.settings = settings
        self.index = index
        self.by_name = {model.name: model for model in served}
        if not served or len(self.by_name) < len(served):
            raise ConfigError(f"each served model needs a name of its own; given {[model.name for model in served]}")

    def find(self, name: str) -> Served:
        """The model of that name; 404 as OpenAI answers it."""
        if name in self.by_name:
            return self.by_name[name]
        known = ", ".join(self.by_name)
        message = f"The model '{name}' does not exist; there is: {known}."
        raise ApiError(404, message, param="model", code="model_not_found")

    def failure(self) -> BaseException | None:
        """Why an engine has stopped working; None while all are well."""
        return next((model.engine.failure for model in self.by_name.values() if model.engine.failure), None)

    def close(self) -> None:
        """Stop all engines."""
        for model in self.by_name.values():
            model.engine.close()

    def submit(self, body: CompletionRequest | ChatRequest) -> Submitted:
        """One ticket per prompt. Reads the prompts, so call it in a thread of its own."""
        model, hits = self.find(body.model), list[Hit]()
        index = None if body.retrieve is False else self.index
        read = self._chat if isinstance(body, ChatRequest) else self._completions
        requests = read(model, body, index, hits)  # type: ignore[arg-type]
        tickets: list[Ticket] = []
        try:
            for request in requests:
                tickets.append(model.engine.submit(request))
        except BaseException:
            for ticket in tickets:
                ticket.cancel()
            raise
        return Submitted(model, tickets, hits if index else None)

    def _chat(self, model: Served, body: ChatRequest, index: Index | None, hits: list[Hit]) -> list[Request]:
        if body.top_logprobs is not None and not body.logprobs:
            raise ApiError(400, "'top_logprobs' needs 'logprobs' to be true.", param="top_logprobs")
        if None not in (body.max_tokens, body.max_completion_tokens):
            raise ApiError(400, "Give 'max_tokens' or 'max_completion_tokens', not both.", param="max_tokens")
        most = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        messages = [message.plain() for message in body.messages]
        if index is not None:
            messages, found = before_question(index, model.runtime, messages, most or ANSWER_TOKENS)
            hits += found
        request = model.runtime.chat_request(messages, _options(body, 1), **self._fields(body, logprobs))
        return [self._fitted(model, request, most)]

    def _completions(
        self, model: Served, body: CompletionRequest, index: Index | None, hits: list[Hit]
    ) -> list[Request]:
        prompts: list[Any] = (
            body.prompt if isinstance(body.prompt, list) and not isinstance(body.prompt[0], int) else [body.prompt]
        )
        most = COMPLETION_TOKENS if body.max_tokens is None else body.max_tokens
        options, fields = _options(body, most), self._fields(body, body.logprobs)
        found = []
        for prompt in prompts:
            if index is not None and isinstance(prompt, str):
                prompt, helping = before_prompt(index, model.runtime, prompt, most)
                hits += helping
            ids = model.runtime.encode(prompt) if isinstance(prompt, str) else prompt
            found.append(self._fitted(model, Request(ids, options, **fields), most))
        return found

    def _fields(self, body: Sampling, logprobs: int | None) -> dict[str, Any]:
        seconds = self.settings.request_seconds
        return {"n": body.n or 1, "logprobs": logprobs, "gates": bool(body.gates), "deadline": seconds}

    def _fitted(self, model: Served, request: Request, most: int | None) -> Request:
        """The request with its number of tokens, unless prompt and answer are more than what is allowed."""
        used, room, settings = len(request.prompt), model.runtime.max_length, self.settings
        if used > (settings.max_prompt_tokens or room):
            limit = settings.max_prompt_tokens or room
            raise _too_long(f"The prompt has {used} tokens; at most {limit} are allowed.", "prompt")
        wanted = min(room - used, settings.max_tokens or room) if most is None else most
        if settings.max_tokens and wanted > settings.max_tokens:
            message = f"max_tokens is {wanted}; this server allows {settings.max_tokens}."
            raise ApiError(400, message, param="max_tokens", code="max_tokens_too_large")
        if wanted < 1 or used + wanted > room:
            raise _too_long(
                f"This model's maximum context length is {room} tokens. However, you requested {used + max(wanted, 1)} "
                f"tokens ({used} in the prompt, {max(wanted, 1)} in the completion). Please shorten one of them.",
                "max_tokens",
            )
        return replace(request, options=replace(request.options, max_new_tokens=wanted))


def _too_long(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def _options(body: Sampling, max_new_tokens: int) -> GenerationOptions:
    stop = body.stop or ()
    return GenerationOptions(
        max_new_tokens=max_new_tokens,
        temperature=1.0 if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=body.top_k or 0,
        repetition_penalty=1.0 if body.repetition_penalty is None else body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        seed=secrets.randbelow(2**63) if body.seed is None else body.seed % 2**63,
        stop=stop if isinstance(stop, str) else tuple(stop),
    )
