"""The page of gates: whole, self-contained, and in a browser really showing the model's numbers."""

import json
import re
from pathlib import Path

import pytest
import torch

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.eval.gates import draw_gates, gate_page, read_text, watch
from tests.browser import Page, browser, find_browser
from tests.deploy import tiny
from tests.eval.gates.test_observe import PRUNED
from tests.lab.test_report import Balanced

TEXT = "The state is read & <b>kept</b>;\n\n42 windows – naïve </script><script>alert(1)</script> " * 3


SIDES = ("top", "bottom")


@pytest.fixture(scope="module")
def model():
    return tiny.tiny_model(vocab_size=258, num_hidden_layers=4, layers=PRUNED, pad_token_id=None, bos_token_id=None,
                           eos_token_id=256)  # fmt: skip


@pytest.fixture(scope="module")
def record(model) -> dict:
    read = read_text(byte_tokenizer(), TEXT)
    return {"model": "runs/a <model>", **watch(model, read.rows(256, 1), read, byte_tokenizer())}


@pytest.fixture(scope="module")
def page(record) -> str:
    return gate_page(record, draw_gates(record))


def test_the_page_is_whole_and_loads_nothing(page: str) -> None:
    without_scripts = re.sub(r"<script.*?</script>", "", page, flags=re.DOTALL)
    parsed = Balanced(without_scripts)
    assert "Token by token" in parsed.text and "runs/a <model>" in parsed.text and "Mamba alone (pruned)" in parsed.text
    assert len(parsed.ids) == len(set(parsed.ids))
    assert not re.findall(r'(?:src|href)\s*=\s*"(?!#|data:)[^"]*"', page) and "@import" not in page
    assert page.count("<script") == 2 and page.count("data:image/png;base64,") == 2


def test_every_token_has_a_name_for_readers(page: str, record: dict) -> None:
    labels = re.findall(r'aria-label="([^"]*, token \d+, [^"]*)"', page)
    assert len(labels) == len(record["shown"]["ids"]) == page.count('role="button"')
    assert page.count('tabindex="0" aria-pressed') == 1  # one stop for Tab; arrows go on
    mean = sum(layer[0] for layer in record["shown"]["mean"]) / 2
    assert labels[0] == f"“T”, token 0, word, mean gate {mean:.3f}"
    assert sum(label.startswith("line break") for label in labels) == 6
    assert sum(label.startswith("part of a character") for label in labels) == 9


@pytest.fixture(scope="module")
def tab():
    path = find_browser()
    if path is None:
        pytest.skip("no Chromium or Chrome here (Debian: apt-get install chromium)")
    with browser(path) as opened:
        yield opened


@pytest.fixture
def opened(tab: Page, page: str, tmp_path: Path) -> Page:
    (tmp_path / "gates.html").write_text(page, encoding="utf-8")
    tab.console.clear()
    tab.open(tmp_path / "gates.html")
    return tab


def strips(tab: Page) -> list[str]:
    return tab.run("[...document.querySelectorAll('#panel output')].map((output) => output.textContent)")


def expected(model, record: dict, token: int) -> list[str]:
    with torch.no_grad():
        gates = model(torch.tensor([record["shown"]["ids"]]), output_gates=True).gates
    return [f"{gate[0, token].mean().item():.3f}" for gate in gates if gate is not None]


def close(got: list[str], want: list[str]) -> bool:
    """Equal to the last digit shown, which was rounded twice."""
    return len(got) == len(want) and all(abs(float(a) - float(b)) < 0.0011 for a, b in zip(got, want, strict=True))


def test_hovering_shows_the_models_gates(opened: Page, model, record: dict) -> None:
    assert strips(opened) == ["–", "–"]
    for token in (4, 60, 130):
        opened.hover(f'[data-i="{token}"]')
        assert close(strips(opened), expected(model, record, token))
        assert opened.run("document.getElementById('about').textContent").startswith(f"token {token}, ")
    position = opened.run("parseFloat(document.querySelector('#layer-2 b').style.left) / 100")
    assert f"{position:.3f}" == strips(opened)[1]
    without = opened.run("[...document.querySelectorAll('.without')].map((cell) => cell.textContent)")
    assert without == ["Mamba alone (pruned)", "attention alone"]
    assert opened.console == []


def test_the_keyboard_goes_from_token_to_token(opened: Page, model, record: dict) -> None:
    opened.run("document.getElementById('by').focus()")
    opened.press("Tab")
    assert opened.run("document.activeElement.dataset.i") == "0"
    for _ in range(3):
        opened.press("ArrowRight")
    opened.press("ArrowLeft")
    assert opened.run("document.activeElement.dataset.i") == "2"
    assert close(strips(opened), expected(model, record, 2))
    opened.press("End")
    last = len(record["shown"]["ids"]) - 1
    assert opened.run("document.activeElement.dataset.i") == str(last)
    opened.press("Home")
    assert opened.run("document.querySelectorAll('.t[tabindex=\"0\"]').length") == 1


def test_tints_follow_the_layer_chosen(opened: Page, record: dict) -> None:
    tint = "parseFloat(document.querySelector('[data-i=\"7\"]').style.getPropertyValue('--tint'))"
    for layer in (0, 1):
        opened.run(f"document.getElementById('by').value = '{layer}'")
        opened.run("document.getElementById('by').dispatchEvent(new Event('change'))")
        means = record["shown"]["mean"][layer]
        most = max(0.02, *(abs(mean - 0.5) for mean in means))
        assert opened.run(tint) == pytest.approx(abs(means[7] - 0.5) / most, abs=1e-3)


def test_a_phone_and_the_dark(tab: Page, page: str, tmp_path: Path) -> None:
    (tmp_path / "gates.html").write_text(page, encoding="utf-8")
    tab.open(tmp_path / "gates.html", width=390, height=844, dark=True)
    assert tab.run("document.documentElement.scrollWidth") <= 390
    assert tab.run("getComputedStyle(document.body).backgroundColor") == "rgb(18, 22, 28)"
    tab.click('[data-i="30"]')
    top, bottom = (tab.run(f"document.getElementById('panel').getBoundingClientRect().{side}") for side in SIDES)
    assert 0 < top < bottom <= 844  # seen together with the token
    assert strips(tab)[0] != "–"


def test_the_texts_script_does_not_run(opened: Page) -> None:
    data = json.loads(opened.run("document.getElementById('data').textContent"))
    assert opened.run("document.scripts.length") == 2 and len(data["layers"]) == 2
    assert opened.run("document.getElementById('text').textContent.includes('<script>alert(1)</script>')")
