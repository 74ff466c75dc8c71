"""The OpenAPI document is what the server does: schemathesis asks every route what the document allows and more."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from fusiontree.deploy.server.models import Served
from fusiontree.deploy.server.settings import ServerSettings
from tests.deploy.server.fakes import FakeEngine, FakeRuntime
from tests.deploy.server.live import serving

EXAMPLES = 15  # per route and mode
CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    unsupported_method,
]  # fmt: skip


@pytest.fixture(scope="module")
def api() -> Iterator[Any]:
    limits = ServerSettings(max_tokens=8)
    with serving([Served("tiny", FakeRuntime(), FakeEngine())], limits) as address:
        yield schemathesis.openapi.from_url(f"{address}/openapi.json", wait_for_schema=10)


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_every_route_does_what_the_document_says(api: Any, mode: GenerationMode) -> None:
    asked = 0
    for operation in (found.ok() for found in api.get_all_operations()):

        @given(case=operation.as_strategy(generation_mode=mode))
        @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
        def ask(case: Any) -> None:
            nonlocal asked
            case.call_and_validate(checks=CHECKS, timeout=20)
            asked += 1

        try:
            ask()
        except Unsatisfiable:  # nothing can be wrong with a route that takes nothing
            assert mode is GenerationMode.NEGATIVE and operation.method == "get"
    assert asked > 2 * EXAMPLES


def test_the_document_names_every_field_and_error(api: Any) -> None:
    paths = api.raw_schema["paths"]
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/stats"} <= set(paths)
    fields = api.raw_schema["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"messages", "stream", "max_completion_tokens", "gates", "top_logprobs"} <= set(fields)
    for path in paths.values():
        for operation in path.values():
            assert {"4XX", "5XX"} <= set(operation["responses"]) and "422" not in operation["responses"]
