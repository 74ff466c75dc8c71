"""What may be asked for, field by field: OpenAI's names, plus `top_k`, `repetition_penalty` and `gates`.

An unknown field is refused, as OpenAI does: one that is misspelt must not silently do nothing. A field of OpenAI's that
this server has no use for is taken where ignoring it changes no answer (`user`, `metadata`, …) and otherwise only with
the value that means "off" (`tools` empty, `echo` false, …).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from fusiontree.deploy.requests import MAX_CHOICES, MAX_LOGPROBS
from fusiontree.deploy.sampling import MAX_STOP_LENGTH, MAX_STOPS

MAX_PROMPTS = 64
MAX_MESSAGES = 4096
_INT64 = 2**63

Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_LENGTH)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]


def _off(*allowed: Any) -> BeforeValidator:
    """Allows null, an empty list or mapping, and the values named."""

    def check(value: Any) -> Any:
        if value is None or value in ([], {}) or any(type(value) is type(good) and value == good for good in allowed):
            return value
        raise ValueError("this server cannot do that; leave the field out")

    return BeforeValidator(check)


class Strict(BaseModel):
    """No unknown fields, no other types, no numbers that are none."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class StreamOptions(Strict):
    """`stream_options`."""

    include_usage: bool = False
    include_obfuscation: bool = False
    """Taken and not acted on: it pads the chunks."""


class Sampling(Strict):
    """The fields that both routes share."""

    model: str = Field(max_length=300)
    max_tokens: int | None = Field(None, ge=1, lt=2**31)
    temperature: float | None = Field(None, ge=0, le=2, description="1 when left out; 0: always the most probable")
    top_p: float | None = Field(None, gt=0, le=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64, description="left out: another one each time")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    top_k: int | None = Field(None, ge=0, lt=2**31, description="FusionTree: draw among so many tokens; 0: all")
    repetition_penalty: float | None = Field(None, gt=0, le=100, description="FusionTree")
    gates: bool | None = Field(None, description="FusionTree: each token brings the mean gate of every layer")

    retrieve: bool | None = Field(None, description="FusionTree: false leaves out what --retrieve would put before")

    # Without an effect here.
    user: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    # Taken only where it is off.
    logit_bias: Annotated[dict[str, float] | None, _off()] = None


class CompletionRequest(Sampling):
    """The body of POST /v1/completions."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    )
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: Annotated[bool | None, _off(False)] = None
    suffix: Annotated[str | None, _off("")] = None
    best_of: Annotated[int | None, _off(1)] = None


class TextPart(Strict):
    """One piece of a message's content."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1)]
    name: str | None = None
    refusal: Annotated[str | None, _off()] = None
    tool_calls: Annotated[list[Any] | None, _off()] = None
    function_call: Annotated[dict[str, Any] | None, _off()] = None
    audio: Annotated[dict[str, Any] | None, _off()] = None
    annotations: Annotated[list[Any] | None, _off()] = None

    def plain(self) -> dict[str, str]:
        """As the runtime takes it."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatRequest(Sampling):
    """The body of POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(None, ge=1, lt=2**31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    response_format: Annotated[dict[str, str] | None, _off({"type": "text"})] = None
    tools: Annotated[list[Any] | None, _off()] = None
    tool_choice: Annotated[str | None, _off("none", "auto")] = None
    parallel_tool_calls: bool | None = None
    store: Annotated[bool | None, _off(False)] = None


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every error's body."""

    error: ErrorDetail
