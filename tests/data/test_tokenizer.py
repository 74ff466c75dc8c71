"""Tokenizers: lossless, deterministic, never fetched in silence, and refused with one clear line."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fusiontree.data import (
    SourceConfig,
    TokenizerConfig,
    byte_tokenizer,
    check_vocabulary,
    load_tokenizer,
    resolve_tokenizer,
    tokenizer_hash,
    train_tokenizer,
)
from fusiontree.errors import ConfigError, DataError

BYTES = byte_tokenizer()


@pytest.fixture
def source(jsonl) -> SourceConfig:
    words = ("return", "self", "import", "fusion", "tree", "gate", "state")
    return SourceConfig(path=jsonl([" ".join(words[(i * j) % 7] for j in range(9)) for i in range(60)]))


@given(st.text())
def test_a_byte_is_an_id_and_nothing_is_lost(text: str) -> None:
    assert BYTES(text).input_ids == list(text.encode()) or "<|" in text
    assert BYTES.decode(BYTES(text).input_ids) == text


def test_byte_tokenizer_has_its_two_special_ids() -> None:
    assert (len(BYTES), BYTES.eos_token_id, BYTES.pad_token_id) == (258, 256, 257)


def test_training_is_deterministic_and_loads_as_an_ordinary_tokenizer(source: SourceConfig, tmp_path: Path) -> None:
    first = train_tokenizer([source], 280, tmp_path / "one")
    second = train_tokenizer([source], 280, tmp_path / "two")
    assert len(first) == 280 and tokenizer_hash(first) == tokenizer_hash(second)
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    for loaded in (load_tokenizer(tmp_path / "one"), AutoTokenizer.from_pretrained(str(tmp_path / "one"))):
        assert tokenizer_hash(loaded) == tokenizer_hash(first)
        assert (loaded.eos_token, loaded.pad_token) == ("<|endoftext|>", "<|pad|>")
        text = " return self.gate\n\tcafé 中 \0"
        assert loaded.decode(loaded(text).input_ids) == text
    assert not list(tmp_path.glob("*.tmp"))


def test_truncation_and_padding_settings_do_not_change_the_hash(source: SourceConfig, tmp_path: Path) -> None:
    tokenizer = train_tokenizer([source], 280, tmp_path / "one")
    before = tokenizer_hash(tokenizer)
    tokenizer(["a", "abc def"], padding=True, truncation=True, max_length=2)
    assert tokenizer_hash(tokenizer) == before
    assert tokenizer_hash(BYTES) != before


def test_the_chat_template_marks_turns() -> None:
    chat = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}, {"role": "user", "content": "?"}]
    text = BYTES.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "User: hi\n\nAssistant: yo<|endoftext|>\n\nUser: ?\n\nAssistant:"


def test_a_small_text_yields_a_small_vocabulary_with_a_word(jsonl, tmp_path: Path, caplog) -> None:
    tokenizer = train_tokenizer([SourceConfig(path=jsonl(["aa"]))], 1000, tmp_path / "t")
    assert len(tokenizer) < 1000 and "only, not 1000" in caplog.text


def test_training_refuses_what_it_cannot_do(source: SourceConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 258"):
        train_tokenizer([source], 257, tmp_path / "t")
    with pytest.raises(DataError, match="no sources"):
        train_tokenizer([], 280, tmp_path / "t")
    (tmp_path / "full").mkdir()
    (tmp_path / "full/notes").write_text("mine")
    with pytest.raises(DataError, match="not an empty folder"):
        train_tokenizer([source], 280, tmp_path / "full")
    assert not (tmp_path / "t").exists()


def test_a_name_never_reaches_for_the_net_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise AssertionError("network used")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(DataError, match=r"neither a folder here nor in the local Hugging Face cache"):
        load_tokenizer("nobody/has-this-tokenizer")


@pytest.mark.parametrize("content", [None, "{", "{}", '{"version": "1.0"}'])
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(DataError, match="no tokenizer can be loaded"):
        load_tokenizer(tmp_path)
    with pytest.raises(DataError, match="not a folder"):
        load_tokenizer(tmp_path / "missing")


def test_code_in_a_tokenizer_folder_is_not_run(tmp_path: Path) -> None:
    BYTES.save_pretrained(str(tmp_path))
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["auto_map"] = {"AutoTokenizer": [None, "evil.Evil"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'canary')!r}, 'w')\nclass Evil: pass\n")
    try:
        load_tokenizer(tmp_path)
    except DataError as error:
        assert str(tmp_path) in str(error)
    assert not (tmp_path / "canary").exists()


def test_a_tokenizer_without_end_token_is_refused(tmp_path: Path) -> None:
    PreTrainedTokenizerFast(tokenizer_object=BYTES.backend_tokenizer).save_pretrained(str(tmp_path))
    with pytest.raises(DataError, match="no eos token"):
        load_tokenizer(tmp_path)


def test_vocabulary_check_names_both_numbers() -> None:
    check_vocabulary(BYTES, 258)
    check_vocabulary(BYTES, 512)
    with pytest.raises(DataError, match=r"ids up to 257, the model's vocab_size is 256; it must be at least 258"):
        check_vocabulary(BYTES, 256)


def test_resolving_trains_or_loads_once_and_then_keeps_the_runs_own(source: SourceConfig, tmp_path: Path) -> None:
    trained = resolve_tokenizer(TokenizerConfig(train_vocab_size=280), [source], tmp_path / "run/tokenizer")
    again = resolve_tokenizer(TokenizerConfig(train_vocab_size=280), [source], tmp_path / "run/tokenizer")
    assert tokenizer_hash(trained) == tokenizer_hash(again) and len(again) == 280
    moved = TokenizerConfig(path=str(tmp_path / "run/tokenizer"))  # the same one under another name
    assert len(resolve_tokenizer(moved, [source], tmp_path / "run/tokenizer")) == 280
    other_text = source.model_copy(update={"min_length": 7})
    for config, text in (
        (TokenizerConfig(path="byte"), source),
        (TokenizerConfig(train_vocab_size=281), source),
        (TokenizerConfig(train_vocab_size=280), other_text),
    ):
        with pytest.raises(ConfigError, match=r"data\.tokenizer: .*made with other settings or text"):
            resolve_tokenizer(config, [text], tmp_path / "run/tokenizer")
    copied = resolve_tokenizer(TokenizerConfig(path="byte"), [], tmp_path / "other")
    assert tokenizer_hash(copied) == tokenizer_hash(BYTES) and (tmp_path / "other/tokenizer.json").exists()
    with pytest.raises(ConfigError, match="give path"):
        resolve_tokenizer(TokenizerConfig(), [], tmp_path / "none")
    with pytest.raises(ValueError, match="exclude each other"):
        TokenizerConfig(path="byte", train_vocab_size=300)


def test_unusable_text_stops_the_training_with_its_own_message(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n' + "{\n" * 9)
    with pytest.raises(DataError, match=r"9 of 10 records are bad.*first .*a\.jsonl:2: malformed JSON"):
        train_tokenizer([SourceConfig(path=str(tmp_path / "a.jsonl"))], 280, tmp_path / "t")
    assert not (tmp_path / "t").exists()
