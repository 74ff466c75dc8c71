"""Streams give out whole characters only, never a stop string, and in sum the whole text."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusiontree.deploy.text_stream import TextStream
from tests.deploy.tiny import byte_tokenizer

TOKENIZER = byte_tokenizer()
PROMPT = TOKENIZER("naïve prompt 🙂")["input_ids"]


def pieces_of(tokens: list[int], stops: tuple[str, ...] = ()) -> tuple[list[str], TextStream]:
    stream = TextStream(TOKENIZER, PROMPT, stops)
    pieces = []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream


def tokens_of(text: str) -> list[int]:
    return TOKENIZER(text)["input_ids"]


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
def test_any_text_comes_out_whole_and_in_whole_characters(text: str) -> None:
    pieces, _ = pieces_of(tokens_of(text))
    assert "".join(pieces) == text
    for piece in pieces:
        piece.encode("utf-8")


def test_a_character_waits_for_its_last_byte() -> None:
    pieces, _ = pieces_of(tokens_of("a€🙂"))
    assert pieces == ["a", "", "", "€", "", "", "", "🙂", ""]


def test_an_unfinished_character_is_not_given_out_and_comes_with_the_rest_later() -> None:
    tokens = tokens_of("x🙂y")
    pieces, stream = pieces_of(tokens[:3])
    assert "".join(pieces) == "x"
    later = TextStream(TOKENIZER, [*PROMPT, *tokens[:3]], read=stream.read, emitted=stream.emitted)
    assert "".join(later.push(token) for token in tokens[3:]) == "🙂y"


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_random_bytes_never_break_the_stream(tokens: list[int]) -> None:
    pieces, _ = pieces_of(tokens)
    whole = TOKENIZER.decode(tokens)
    joined = "".join(pieces)
    joined.encode("utf-8")
    assert whole.replace("\ufffd", "").startswith(joined.replace("\ufffd", "")[:1]) or not joined
    assert len(whole) - len(joined) <= 3


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("one\nUser: two", ("\nUser:",), "one"),
        ("one\nUse it", ("\nUser:",), "one\nUse it"),
        ("ends with \nUser", ("\nUser:",), "ends with \nUser"),
        ("abcabd", ("abd", "bc"), "a"),
        ("aaab", ("aab",), "a"),
        ("héé!", ("é!",), "hé"),
    ],
)
def test_the_text_ends_before_the_first_stop(text: str, stops: tuple[str, ...], wanted: str) -> None:
    pieces, stream = pieces_of(tokens_of(text), stops)
    assert "".join(pieces) == wanted
    assert stream.stopped == (wanted != text)
