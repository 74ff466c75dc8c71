"""Retrieval: the right passage is found, in English and Chinese, within the room there is; damage is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fusiontree.deploy.retrieval import Hit, Index, Passage, before_prompt, before_question, build_index, fitting, words
from fusiontree.deploy.server.models import Served
from fusiontree.errors import DataError, FusionTreeError
from tests.deploy.server.fakes import FakeEngine, FakeRuntime
from tests.deploy.server.live import Raw, request, serving

pytest.importorskip("bm25s")

TEXTS = {
    "river.txt": "The Danube flows into the Black Sea.\nIt crosses ten countries.\n\n" + "Boats drift.\n" * 30,
    "gates.txt": "A gate fuses two branches.\nThe Mamba branch reads the whole text.\n",
    "河流.txt": "长江是亚洲最长的河流。\n它流入东海。\n黄河流经九个省。\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("texts")
    for name, text in TEXTS.items():
        (place / name).write_text(text, encoding="utf-8")
    (place / "more.jsonl").write_text('{"text": "Windows look at the last few keys only."}\n')
    count = build_index([f"{place}/*.txt", f"{place}/more.jsonl"], place / "index", size=100)
    assert count >= 8
    return place


@pytest.mark.parametrize(
    ("question", "source", "line"),
    [
        ("where does the danube flow?", "river.txt", 1),
        ("What do WINDOWS look at", "more.jsonl", 1),
        ("which branch reads whole texts", "gates.txt", 1),
        ("长江流入哪里？", "河流.txt", 1),
        ("ｄａｎｕｂｅ", "river.txt", 1),
    ],
)
def test_the_right_passage_is_found(folder: Path, question: str, source: str, line: int) -> None:
    best = Index(folder / "index").search(question)[0]
    assert (Path(best.passage.source).name, best.passage.line) == (source, line) and best.score > 0


def test_nothing_in_common_finds_nothing(folder: Path) -> None:
    index = Index(folder / "index")
    assert index.search("zzz qqq") == [] == index.search("") == index.search("!?。")
    assert len(index.search("the", most=2)) <= 2


def test_words_of_many_scripts() -> None:
    assert words("Don't STOP_me 3.5") == ["don", "t", "stop", "me", "3", "5"]
    assert words("读长江。好") == ["读长", "长江", "好"]


def test_passages_keep_their_place_and_lose_nothing(folder: Path) -> None:
    index = Index(folder / "index")
    river = [passage for passage in index.passages if passage.source.endswith("river.txt")]
    lines = TEXTS["river.txt"].splitlines()
    for passage in river:
        assert passage.text.splitlines()[0] == lines[passage.line - 1] and len(passage.text) <= 100
    assert "".join("".join(p.text.split()) for p in river) == "".join(TEXTS["river.txt"].split())


def test_only_what_fits_is_put_before_a_prompt(folder: Path) -> None:
    runtime, index = FakeRuntime(), Index(folder / "index")
    runtime.max_length = 1000  # a temporary folder's name is long
    prompt, hits = before_prompt(index, runtime, "the danube", new_tokens=50)
    assert hits and prompt.startswith("[1] ") and prompt.endswith("the danube")
    assert len(runtime.encode(prompt)) + 50 <= runtime.max_length
    assert before_prompt(index, runtime, "the danube", new_tokens=980) == ("the danube", [])
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "the danube"}]
    asked, found = before_question(index, runtime, messages, new_tokens=20)
    assert found and asked[0] == messages[0] and asked[1]["content"].endswith("the danube")
    assert messages[1]["content"] == "the danube"


def test_a_passage_too_long_makes_way_for_the_next() -> None:
    hits = [Hit(Passage("a", 1, "x" * 90), 2.0), Hit(Passage("b", 7, "y"), 1.0)]
    assert fitting(hits, len, 40) == ("[1] b:7\ny\n\n", [hits[1]])


def test_what_is_no_index_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError):
        Index(tmp_path)
    with pytest.raises(FusionTreeError):
        build_index([f"{tmp_path}/none-*.txt"], tmp_path / "index")
    build_index([str(folder / "river.txt")], tmp_path / "index")
    damaged = tmp_path / "index" / "passages.jsonl"
    damaged.write_text(json.dumps({"source": "x", "line": 1, "text": "injected"}) + "\n")
    with pytest.raises(DataError, match="cannot be read"):
        Index(tmp_path / "index")


def test_the_server_puts_passages_before_prompts_and_names_them(folder: Path) -> None:
    runtime = FakeRuntime()
    runtime.max_length = 1000
    body = {"model": "tiny", "messages": [{"role": "user", "content": "the danube"}], "max_tokens": 3}
    with serving([Served("tiny", runtime, FakeEngine())], index=Index(folder / "index")) as address:
        helped = request(address, "POST", "/v1/chat/completions", body)[2]
        alone = request(address, "POST", "/v1/chat/completions", {**body, "retrieve": False})[2]
        text = {"model": "tiny", "prompt": "the danube", "max_tokens": 3, "stream": True}
        with Raw(address) as raw:
            data = json.dumps(text)
            raw.send("POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
            raw.send(f"Content-Length: {len(data)}\r\n\r\n{data}")
            chunks = [json.loads(line[6:]) for line in raw.read_until(b"[DONE]").splitlines() if line[:7] == b"data: {"]
    assert helped["sources"][0]["source"].endswith("river.txt") and helped["sources"][0]["line"] == 1
    assert "sources" not in alone and helped["usage"]["prompt_tokens"] > alone["usage"]["prompt_tokens"] + 50
    assert chunks[0]["sources"] == helped["sources"] and all("sources" not in chunk for chunk in chunks[1:])
