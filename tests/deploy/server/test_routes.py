"""Routes beside OpenAI's: health, metrics, figures for the page, the key's form; and the OpenAPI document."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fusiontree.deploy.server.models import Models, Served
from fusiontree.deploy.server.settings import ServerSettings
from fusiontree.errors import ConfigError
from tests.deploy.server.fakes import FakeEngine, FakeRuntime
from tests.deploy.server.live import request, serving

KEY = "a Key: ü%"
BEARER = {"Authorization": f"Bearer {KEY}".encode().decode("latin-1")}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    report = tmp_path_factory.mktemp("run") / "report.html"
    report.write_text("<h1>the run</h1>")
    with serving(
        [Served("tiny", FakeRuntime(), FakeEngine())], ServerSettings(keys=(KEY.encode(),)), report
    ) as running:
        yield running


def test_health_is_open_and_everything_counts(address: str) -> None:
    assert request(address, "GET", "/health")[::2] == (200, {"status": "ok"})
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 7}
    assert request(address, "POST", "/v1/completions", body, BEARER)[0] == 200
    status, headers, text = request(address, "GET", "/metrics", headers=BEARER)
    assert status == 200 and headers["content-type"].startswith("text/plain")
    figures = dict(line.rsplit(b" ", 1) for line in text.splitlines() if not line.startswith(b"#"))
    assert float(figures[b'fusiontree_completion_tokens_total{model="tiny"}']) == 7
    assert float(figures[b'fusiontree_finished_total{model="tiny",reason="length"}']) == 1
    assert float(figures[b'fusiontree_http_requests_total{route="/v1/completions",status="200"}']) == 1
    assert float(figures[b'fusiontree_first_token_seconds_count{model="tiny"}']) == 1
    stats = request(address, "GET", "/stats", headers=BEARER)[2]
    assert stats["tiny"]["completion_tokens"] == 7 and stats["tiny"]["slots"] == 32


def test_the_page_asks_for_the_key_and_a_cookie_opens_it(address: str) -> None:
    status, headers, form = request(address, "GET", "/")
    assert status == 401 and b'action="/login"' in form and "default-src 'none'" in headers["content-security-policy"]
    assert request(address, "POST", "/login", b"key=wrong", FORM)[0] == 401
    status, headers, _ = request(address, "POST", "/login", b"key=a+Key%3A+%C3%BC%25", FORM)
    assert status == 303 and headers["location"] == "/"
    cookie = headers["set-cookie"]
    assert "HttpOnly" in cookie and "SameSite=strict" in cookie and KEY not in cookie
    opened = {"Cookie": cookie.split(";")[0]}
    assert request(address, "GET", "/", headers=opened)[0] == 200
    assert request(address, "GET", "/v1/models", headers=opened)[0] == 200
    later = {"Cookie": re.sub(r"=(\d+)", lambda found: f"={int(found[1]) + 1}", opened["Cookie"])}
    assert request(address, "GET", "/v1/models", headers=later)[0] == 401
    assert 'fusiontree=""' in request(address, "POST", "/logout", headers=opened)[1]["set-cookie"]


def test_the_report_of_a_run_is_served(address: str) -> None:
    assert request(address, "GET", "/report", headers=BEARER)[2] == b"<h1>the run</h1>"
    assert request(address, "GET", "/page-settings", headers=BEARER)[2] == {"report": True, "key": True}


def test_only_the_page_s_own_files_can_be_had(address: str) -> None:
    assert request(address, "GET", "/page/index.html", headers=BEARER)[0] == 200
    for name in ("nothing.js", "..%2f..%2fapp.py", "../app.py", "%2e%2e/app.py", ""):
        assert request(address, "GET", f"/page/{name}", headers=BEARER)[0] == 404


def test_unknown_routes_and_methods_are_errors_of_the_same_form(address: str) -> None:
    for method, path, status in (("GET", "/nowhere", 404), ("DELETE", "/v1/models", 405), ("GET", "/docs", 404)):
        answer = request(address, method, path, headers=BEARER)
        assert answer[0] == status and set(answer[2]["error"]) == {"message", "type", "param", "code"}


def test_models_need_names_of_their_own() -> None:
    engine = FakeEngine()
    served = Served("one", FakeRuntime(), engine)
    for models in ([served, served], []):
        with pytest.raises(ConfigError, match="name of its own"):
            Models(models, ServerSettings())
    engine.close()


@pytest.mark.parametrize(
    "fields", [{"keys": (b"",)}, {"keys": (b"a\n",)}, {"max_body_bytes": 0}, {"body_seconds": float("nan")}]
)
def test_impossible_settings_are_refused(fields: dict) -> None:
    with pytest.raises(ConfigError):
        ServerSettings(**fields)


def test_the_page_s_files_are_in_the_wheel() -> None:
    from fusiontree.deploy.server import files

    patterns = Path("pyproject.toml").read_text("utf-8")
    assert {"index.html", "key.html"} <= set(files.names())
    assert all(f'"**/*{name[name.rfind(".") :]}"' in patterns for name in files.names())
