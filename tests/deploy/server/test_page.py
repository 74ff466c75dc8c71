"""The page in a real browser: type, stream, hover, keys, stop, error, key, two models, phone, Chinese."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from fusiontree.deploy.server.models import Served
from fusiontree.deploy.server.settings import ServerSettings
from tests.deploy.server.fakes import FakeEngine, FakeRuntime, expected
from tests.deploy.server.live import serving, until
from tests.deploy.tiny import tiny_model

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
KEY = "sk-Page"
NAMELESS = """() => [...document.querySelectorAll("button, input, select, textarea, a")]
  .filter((e) => e.checkVisibility() && !(e.labels?.length || e.ariaLabel || e.textContent.trim()))
  .map((e) => e.outerHTML)"""
full = FakeEngine()
pruned = FakeEngine()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    small = FakeRuntime()
    small.model = tiny_model(layers=[{"mixers": ["mamba", "attention"]}, {"mixers": ["mamba"]}])
    with serving([Served("full", FakeRuntime(), full), Served("pruned", small, pruned)]) as running:
        yield running


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    yield from opened(browser, address)


def opened(browser: Any, address: str, **look: Any) -> Iterator[Any]:
    """A page that is ready; an error in its scripts fails the test."""
    context = browser.new_context(locale="en-US", **look)
    context.set_default_timeout(30_000)
    found = context.new_page()
    problems: list[str] = []
    found.on("pageerror", lambda problem: problems.append(str(problem)))
    found.goto(address)
    found.wait_for_selector("body[data-ready]")
    found.evaluate("document.getElementById('max_tokens').value = 12; document.getElementById('seed').value = 4")
    yield found
    context.close()
    assert not problems


def ask(page: Any, text: str) -> None:
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def answered(page: Any) -> None:
    page.wait_for_selector("#send:visible")


def test_type_stream_hover_and_move_by_keys(page: Any) -> None:
    ask(page, "hello")
    answered(page)
    wanted = expected("user: hello\n", 4, 12)
    assert page.inner_text(".answer .tokens").replace("\n", "") == wanted == page.text_content(".answer .sr")
    tokens = page.locator(".token")
    assert tokens.count() == 12 and "12 tokens" in page.inner_text(".foot")
    strip = tokens.nth(3).locator("i").evaluate("e => getComputedStyle(e).backgroundImage")
    assert strip.startswith("linear-gradient") and "oklab" in strip

    tokens.nth(3).hover()
    values = page.inner_text("#values")
    assert wanted[3] in values and "0.250" in values and "only" in values
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    assert page.evaluate("document.activeElement.text") == wanted[2]
    assert page.evaluate("document.activeElement.getAttribute('aria-describedby')") == "values"
    page.keyboard.press("Escape")
    assert page.locator("#values").is_hidden()
    assert page.locator(".token[tabindex='0']").count() == 1  # one stop for the tab key


def test_a_conversation_goes_on_and_begins_anew(page: Any) -> None:
    ask(page, "hi")
    answered(page)
    ask(page, "more")
    answered(page)
    first = expected("user: hi\n", 4, 12)
    assert page.locator(".answer .sr").nth(1).text_content() == expected(
        f"user: hi\nassistant: {first}\nuser: more\n", 4, 12
    )
    page.click("#fresh")
    assert page.locator(".turn").count() == 0 and page.locator("#empty").is_visible()
    page.click("#mode-completion")
    ask(page, "once")
    answered(page)
    assert page.text_content(".answer .sr") == expected("once", 4, 12)


def test_stop_ends_the_stream_and_the_work(page: Any) -> None:
    full.step_seconds = 0.2
    page.evaluate("document.getElementById('max_tokens').value = 150")
    ask(page, "hello")
    page.wait_for_selector(".token")
    page.click("#stop")
    answered(page)
    until(lambda: full.stats().active == 0)
    full.step_seconds = 0.0
    assert "stopped" in page.inner_text(".foot") and 0 < page.locator(".token").count() < 150


def test_an_error_is_told_and_nothing_is_lost(page: Any) -> None:
    long = "x" * 300
    ask(page, long)
    answered(page)
    assert "at most 256" in page.inner_text("[role=alert]") and page.input_value("#prompt") == long
    ask(page, "short")
    answered(page)
    assert page.locator("[role=alert]").is_hidden()


def test_two_models_beside_each_other(page: Any) -> None:
    assert page.locator(".card").count() == 1 and "no layer pruned" in page.inner_text(".card")
    page.check("#beside")
    assert "1 layer pruned" in page.locator(".card").nth(1).inner_text()
    assert page.locator(".card .gone").count() == 1
    assert "2: only Mamba" in page.locator(".map").nth(1).get_attribute("aria-label")
    ask(page, "hello")
    answered(page)
    assert page.locator(".answer").count() == 2 and page.locator(".token").count() == 24
    assert "0/64" in page.inner_text("#live") and re.search(r"cache\s+4\.0 KiB", page.inner_text("#live"))


def test_chinese_and_back(page: Any) -> None:
    page.click("#language")
    assert page.inner_text("#send") == "发送" and page.get_attribute("html", "lang") == "zh-CN"
    page.reload()
    page.wait_for_selector("body[data-ready]")
    assert page.get_attribute("#prompt", "placeholder") == "说点什么"
    missing = page.evaluate(
        "[...document.querySelectorAll('[data-text]')].filter((e) => /undefined/.test(e.textContent)).length"
    )
    assert missing == 0
    page.click("#language")
    assert page.inner_text("#send") == "Send"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_sticks_out_and_everything_has_a_name(browser: Any, address: str, scheme: str) -> None:
    look = {"viewport": {"width": 360, "height": 700}, "color_scheme": scheme, "has_touch": True}
    for page in opened(browser, address, **look):
        page.check("#beside")
        page.click("#settings summary")
        ask(page, "hello")
        answered(page)
        page.locator(".token").first.tap()
        box = page.locator("#values").bounding_box()
        assert box["x"] >= 0 and box["x"] + box["width"] <= 360
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        assert page.evaluate(NAMELESS) == []


def test_the_key_is_asked_for_and_a_lost_one_is_told(browser: Any) -> None:
    settings = ServerSettings(keys=(KEY.encode(),))
    with serving([Served("full", FakeRuntime(), FakeEngine())], settings) as guarded:
        context = browser.new_context(locale="en-US")
        page = context.new_page()
        page.goto(guarded)
        page.fill("#key", KEY.lower())
        page.keyboard.press("Enter")
        page.wait_for_selector("#wrong:visible")
        page.fill("#key", KEY)
        page.keyboard.press("Enter")
        page.wait_for_selector("body[data-ready]")
        assert page.url == f"{guarded}/" and page.locator("#logout").is_visible()
        context.clear_cookies()
        ask(page, "hello")
        page.wait_for_selector("[role=alert] a")
        context.close()
