"""The application: routes, and the middleware around them (counting, then the key, then the body's size)."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

from fastapi import APIRouter, FastAPI, Request
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect
from starlette.responses import FileResponse, JSONResponse, RedirectResponse, Response

import fusiontree
from fusiontree.deploy.retrieval import Index
from fusiontree.deploy.server import auth, files
from fusiontree.deploy.server.answers import answer_to
from fusiontree.deploy.server.body import BodyLimit, StrictRoute
from fusiontree.deploy.server.errors import ApiError, install
from fusiontree.deploy.server.metrics import CONTENT_TYPE, CountRequests, Metrics
from fusiontree.deploy.server.models import Models, Served, Submitted
from fusiontree.deploy.server.schemas import ChatRequest, CompletionRequest, ErrorBody
from fusiontree.deploy.server.settings import ServerSettings
from fusiontree.deploy.server.streams import EventStream, chunks, while_connected, whole_answer

GONE = 499  # nginx's word for a client that left; nobody sees it
REFUSALS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request cannot be answered"},
    "5XX": {"model": ErrorBody, "description": "The server cannot answer now"},
}
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The answer, or its chunks as server-sent events when `stream` is true",
        "content": {"application/json": {"schema": {"type": "object"}}, "text/event-stream": {}},
    },
    **REFUSALS,
}


def create_app(
    served: Sequence[Served], settings: ServerSettings, report: Path | None = None, index: Index | None = None
) -> FastAPI:
    """The ASGI application over `served`.

    `report`: the page of a training run, opened from the page; `index`: passages of it are put before every prompt.
    """
    models = Models(served, settings, index)
    metrics = Metrics(models)
    routes = [*_api(models, metrics).routes, *_page(models, report).routes]
    paths = frozenset(path for route in routes if (path := getattr(route, "path", "")))

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(models.close)

    app = FastAPI(
        title="FusionTree",
        version=fusiontree.__version__,
        description="OpenAI's completions and chat over FusionTree models.",
        docs_url=None,  # they load scripts from elsewhere
        redoc_url=None,
        lifespan=lifespan,
        middleware=[
            Middleware(CountRequests, metrics=metrics, routes=paths),
            Middleware(auth.Auth, keys=settings.keys),
            Middleware(BodyLimit, limit=settings.max_body_bytes),
        ],
        routes=routes,
    )
    app.state.models = models
    install(app)
    return app


def _api(models: Models, metrics: Metrics) -> APIRouter:
    router = APIRouter(route_class=StrictRoute)

    async def answer(request: Request, body: CompletionRequest | ChatRequest) -> Response:
        """Submit a checked body; a client that leaves ends the work."""
        model, tickets, hits = await _submit(models, body)
        made = answer_to(model, body, lambda usage: metrics.note(model.name, usage), hits)
        patience = models.settings.ping_seconds
        if body.stream:
            return EventStream(chunks(made, tickets, patience))
        try:
            return JSONResponse(await while_connected(request.receive, whole_answer(made, tickets, patience)))
        except ClientDisconnect:
            return Response(status_code=GONE)

    @router.post("/v1/completions", responses=ANSWERS, response_class=JSONResponse)
    async def completions(request: Request, body: CompletionRequest) -> Response:
        """Continue a text."""
        return await answer(request, body)

    @router.post("/v1/chat/completions", responses=ANSWERS, response_class=JSONResponse)
    async def chat_completions(request: Request, body: ChatRequest) -> Response:
        """Answer a conversation."""
        return await answer(request, body)

    @router.get("/v1/models", responses=REFUSALS)
    async def all_models() -> dict[str, Any]:
        """The models that can be asked."""
        return {"object": "list", "data": [model.card() for model in models.by_name.values()]}

    @router.get("/v1/models/{name}", responses=REFUSALS)
    async def one_model(name: str) -> dict[str, Any]:
        """One model."""
        return models.find(name).card()

    @router.get("/health", responses=REFUSALS)
    async def health() -> dict[str, str]:
        """Whether all engines work; open to all."""
        if models.failure() is not None:
            raise ApiError(503, "an engine has stopped working", kind="server_error", code="unavailable")
        return {"status": "ok"}

    @router.get("/metrics", responses=REFUSALS, response_class=Response)
    async def all_metrics() -> Response:
        """Figures for Prometheus."""
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @router.get("/stats", responses=REFUSALS)
    async def stats() -> dict[str, Any]:
        """Each engine as it stands, for the page."""
        return {name: asdict(model.engine.stats()) for name, model in models.by_name.items()}

    return router


async def _submit(models: Models, body: CompletionRequest | ChatRequest) -> Submitted:
    """`Models.submit` in a thread, for it reads whole prompts; what is taken is cancelled if nobody waits any more."""
    work = asyncio.get_running_loop().run_in_executor(None, models.submit, body)
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        work.add_done_callback(_cancel_all)
        raise


def _cancel_all(work: "asyncio.Future[Submitted]") -> None:
    if not work.cancelled() and work.exception() is None:
        for ticket in work.result().tickets:
            ticket.cancel()


def _page(models: Models, report: Path | None) -> APIRouter:
    router = APIRouter(include_in_schema=False)
    known = files.names()

    @router.get("/")
    async def page() -> Response:
        return files.page_file("index.html")

    @router.get("/page/{name}")
    async def part(name: str) -> Response:
        if name not in known:
            raise ApiError(404, "there is no such file")
        return files.page_file(name)

    @router.get("/page-settings")
    async def page_settings() -> dict[str, Any]:
        return {"report": report is not None, "key": bool(models.settings.keys)}

    @router.get("/report")
    async def run_report() -> Response:
        if report is None:
            raise ApiError(404, "the server was started without --report")
        return FileResponse(report, headers={"X-Content-Type-Options": "nosniff"})

    @router.post("/login")
    async def login(request: Request) -> Response:
        keys = models.settings.keys
        form = parse_qs((await request.body()).decode("latin-1"), encoding="utf-8", errors="surrogateescape")
        given = form.get("key", [""])[0].encode("utf-8", "surrogateescape")
        if keys and not auth.matches(keys, given):
            return files.key_page(401, wrong=True)
        answer = RedirectResponse("/", 303)
        if keys:
            secure = request.url.scheme == "https"
            seconds = auth.COOKIE_SECONDS
            answer.set_cookie(
                auth.COOKIE, auth.new_cookie(keys), seconds, httponly=True, samesite="strict", secure=secure
            )
        return answer

    @router.post("/logout")
    async def logout() -> Response:
        answer = RedirectResponse("/", 303)
        answer.delete_cookie(auth.COOKIE, httponly=True, samesite="strict")
        return answer

    return router
