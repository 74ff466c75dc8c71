"""What goes wrong, in the form that OpenAI's clients understand: {"error": {message, type, param, code}}."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse, Response

from fusiontree.deploy.requests import EngineClosed, QueueFull
from fusiontree.errors import FusionTreeError
from fusiontree.models.json_files import one_line

_log = logging.getLogger("fusiontree.serve")
_LONGEST = 500  # characters of a message


class ApiError(HTTPException):
    """An answer that is an error; `kind` is OpenAI's `type`."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(status, message, headers)
        self.body = error_body(message, kind, param, code)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The JSON of an error."""
    clean = one_line(message, _LONGEST).encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be sent
    return {"error": {"message": clean, "type": kind, "param": param, "code": code}}


def response_of(error: ApiError) -> JSONResponse:
    """The response an error becomes."""
    return JSONResponse(error.body, error.status_code, error.headers)


def api_error(problem: FusionTreeError) -> ApiError:
    """What a refusal of the engine or the runtime means for the one who asked."""
    if isinstance(problem, QueueFull):
        again = {"Retry-After": str(math.ceil(problem.retry_after))}
        return ApiError(429, str(problem), kind="rate_limit_error", code="queue_full", headers=again)
    if isinstance(problem, EngineClosed):
        return ApiError(503, str(problem), kind="server_error", code="unavailable")
    return ApiError(400, str(problem), param=_param_in(str(problem)))


def _param_in(message: str) -> str | None:
    """The setting a message begins with, such as `temperature must be …`."""
    found = re.match(r"(\w+)(?:\[\d+\])? (?:must|is)\b", message)
    return {"max_new_tokens": "max_tokens"}.get(found[1], found[1]) if found else None


def install(app: FastAPI) -> None:
    """Make every error of the application one of these."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, problem: RequestValidationError) -> Response:
        return response_of(invalid_request(problem.errors()))

    @app.exception_handler(StarletteHTTPException)
    async def refused(_: Request, problem: StarletteHTTPException) -> Response:
        if isinstance(problem, ApiError):
            return response_of(problem)
        return response_of(ApiError(problem.status_code, str(problem.detail), headers=_dict(problem.headers)))

    @app.exception_handler(FusionTreeError)
    async def unusable(_: Request, problem: FusionTreeError) -> Response:
        return response_of(api_error(problem))

    @app.exception_handler(Exception)
    async def bug(request: Request, problem: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=problem)
        message = "the server made a mistake; its log says more"
        return response_of(ApiError(500, message, kind="server_error", code="internal_error"))


def invalid_request(problems: Sequence[Any]) -> ApiError:
    """The first thing that pydantic found wrong, with the field it is about."""
    problem = problems[0]
    place = [part for part in problem["loc"] if part != "body"]
    # What follows the name of a union's field is pydantic's name of the form that was tried.
    param = str(place[0]) if place else None
    if problem["type"] == "extra_forbidden":
        return ApiError(400, f"Unrecognized request argument supplied: {param}", param=param, code="unknown_parameter")
    if problem["type"] == "missing":
        name = ".".join(map(str, place)) or "body"
        return ApiError(400, f"Missing required parameter: {name}", param=param, code="missing_required_parameter")
    if problem["type"] == "json_invalid" or not place:
        return ApiError(400, "The body must be a JSON object, sent as application/json.", code="invalid_json")
    where = ".".join(str(part) for part in place if not isinstance(part, str) or re.fullmatch(r"\w+", part))
    return ApiError(400, f"Invalid '{where}': {problem['msg']}", param=param, code="invalid_value")


def _dict(headers: Any) -> dict[str, str] | None:
    return dict(headers) if headers else None
