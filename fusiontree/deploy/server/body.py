"""Bodies: never more than the limit in memory, and JSON that cannot hurt what reads it."""

from __future__ import annotations

import json
from typing import Any, NoReturn

from fastapi.routing import APIRoute
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from fusiontree.deploy.server.errors import ApiError, response_of


class BodyLimit:
    """Middleware that counts a body's bytes while they arrive, whatever its header says; more than the limit is 413.

    What a refused client still sends is read and thrown away, so that it gets to see the answer; the deadline of bodies
    ends that.
    """

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if (refusal := self._refusal(Headers(scope=scope))) is not None:
            await response_of(refusal)(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self.limit:
                raise self._too_large()
            return message

        await self.app(scope, counted, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        length = headers.get("content-length", "0")
        if length.isdigit() and (len(length) > 18 or int(length) > self.limit):
            return self._too_large()
        if headers.get("content-encoding", "identity").lower() != "identity":
            return ApiError(415, "Send the body as it is: compressed bodies are not taken.", code="content_encoding")
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"The body is larger than the {self.limit} bytes allowed.", code="body_too_large")


class StrictRequest(Request):
    """A request whose JSON is really JSON."""

    async def json(self) -> Any:
        """The parsed body; ApiError for NaN, lone surrogates, absurd numbers or nesting, and what is no JSON."""
        try:
            value = json.loads((await self.body()).decode("utf-8"), parse_constant=_no_number)
            json.dumps(value, ensure_ascii=False).encode("utf-8")  # finds lone surrogates wherever they stand
        except UnicodeError:
            raise _not_json("it is not valid Unicode") from None
        except RecursionError:
            raise _not_json("it is nested too deeply") from None
        except ValueError as problem:
            raise _not_json(str(problem)) from None
        return value


class StrictRoute(APIRoute):
    """A route that reads its body with `StrictRequest`."""

    def get_route_handler(self) -> Any:
        handler = super().get_route_handler()

        async def strict(request: Request) -> Any:
            return await handler(StrictRequest(request.scope, request.receive))

        return strict


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _not_json(why: str) -> ApiError:
    return ApiError(400, f"We could not parse the JSON body of your request: {why}.", code="invalid_json")
