"""Sessions: saved, restored and forked texts go on exactly as if nothing had happened; damaged ones are refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from fusiontree.deploy.runtime import InferenceRuntime
from fusiontree.deploy.session import Session
from fusiontree.errors import CheckpointError, ConfigError
from tests.deploy.tiny import save_tiny, tiny_model

SAMPLED: dict[str, Any] = {"temperature": 1.0, "top_k": 40}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("session") / "model")


@pytest.fixture(scope="module")
def runtime(folder: Path) -> InferenceRuntime:
    return InferenceRuntime(folder, device="cpu")


def continued(session: Session, count: int = 25) -> list[int]:
    before = len(session.ids)
    session.generate(max_new_tokens=count, **SAMPLED)
    return session.ids[before:]


def test_in_parts_it_gives_what_it_gives_in_one_go(runtime: InferenceRuntime) -> None:
    whole, parts = runtime.start_session("once upon", seed=5), runtime.start_session("once upon", seed=5)
    text = whole.generate(max_new_tokens=30, **SAMPLED)
    assert len(whole.ids) == len(runtime.start_session("once upon").ids) + 30, "the draw met the end token: change it"
    pieces = [parts.generate(max_new_tokens=10, **SAMPLED) for _ in range(3)]
    assert parts.ids == whole.ids
    assert "".join(pieces) == text
    assert text == runtime.generate("once upon", max_new_tokens=30, seed=5, **SAMPLED)


@pytest.mark.parametrize("generated", [0, 1, 17])
def test_saved_and_restored_in_a_new_runtime_it_goes_on_exactly(
    runtime: InferenceRuntime, folder: Path, tmp_path: Path, generated: int
) -> None:
    session = runtime.start_session("the state of 🙂 things", seed=2)
    if generated:
        session.generate(max_new_tokens=generated, **SAMPLED)
    saved = session.save(tmp_path / "saved")
    restored = InferenceRuntime(folder, device="cpu").restore_session(saved)
    assert restored.ids == session.ids and restored.text == session.text
    assert continued(restored) == continued(session)
    assert not any(path.suffix in {".pt", ".bin", ".pkl"} for path in saved.iterdir())


def test_saving_again_replaces_the_save_and_nothing_else(runtime: InferenceRuntime, tmp_path: Path) -> None:
    session = runtime.start_session("x")
    session.save(tmp_path / "saved")
    session.generate(max_new_tokens=3)
    session.save(tmp_path / "saved")
    assert runtime.restore_session(tmp_path / "saved").ids == session.ids
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(CheckpointError, match="not empty"):
        session.save(tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "saved"]


def test_forks_share_the_past_and_nothing_after_it(runtime: InferenceRuntime) -> None:
    session = runtime.start_session("fork here", seed=1)
    session.generate(max_new_tokens=9, **SAMPLED)
    same, other = session.fork(), session.fork()
    other.generate(max_new_tokens=25, seed=99, **SAMPLED)
    wanted = continued(session)
    assert continued(same) == wanted
    assert other.ids[-25:] != wanted


def test_appended_text_is_read_as_if_it_had_been_in_the_prompt(runtime: InferenceRuntime) -> None:
    session = runtime.start_session("one ")
    session.generate(max_new_tokens=6)
    session.append("two ")
    whole = Session(runtime, session.record.model_copy(deep=True, update={"fed": 0}))
    assert continued(session) == continued(whole)


def test_a_stream_that_is_left_can_be_continued(runtime: InferenceRuntime) -> None:
    whole = runtime.start_session("leave", seed=5)
    whole.generate(max_new_tokens=40, **SAMPLED)
    session = runtime.start_session("leave", seed=5)
    stream = session.stream(max_new_tokens=40, **SAMPLED)
    next(stream)
    stream.close()
    left = len(session.ids)
    assert session.ids == whole.ids[:left] and left < len(whole.ids)
    session.generate(max_new_tokens=len(whole.ids) - left, **SAMPLED)
    assert session.ids == whole.ids


def test_a_session_beyond_the_models_positions_is_refused(runtime: InferenceRuntime) -> None:
    session = runtime.start_session("x" * 200)
    with pytest.raises(ConfigError, match="256 positions"):
        session.stream(max_new_tokens=57)


@pytest.fixture
def saved(runtime: InferenceRuntime, tmp_path: Path) -> Path:
    session = runtime.start_session("saved text")
    session.generate(max_new_tokens=4)
    return session.save(tmp_path / "saved")


EDITS: list[tuple[dict[str, Any], str]] = [
    ({"ids": []}, "ids"), ({"ids": [10**6] * 30}, "token 1000000 does not exist"), ({"ids": [-1]}, "ids"),
    ({"fed": 10**9}, "do not fit"), ({"fed": 2}, "has seen"), ({"read": 10**9}, "do not fit"),
    ({"fingerprint": "sha256:0"}, "another model"), ({"format": "x"}, "format"), ({"extra": 1}, "extra"),
    ({"seed": -1}, "seed"),
    ({"cache_sha256": "0"}, "damaged or exchanged"), ({"cache_sha256": None}, "damaged or exchanged"),
]  # fmt: skip


@pytest.mark.parametrize(("edit", "said"), EDITS, ids=[str(edit)[:30] for edit, _ in EDITS])
def test_an_edited_session_is_refused(runtime: InferenceRuntime, saved: Path, edit: dict[str, Any], said: str) -> None:
    path = saved / "session.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **edit}))
    with pytest.raises(CheckpointError, match=said) as refusal:
        runtime.restore_session(saved)
    assert "\n" not in str(refusal.value)


@pytest.mark.fault(row=6)
@pytest.mark.fault(row=7)
def test_one_flipped_bit_a_cut_or_a_missing_file_is_noticed(runtime: InferenceRuntime, saved: Path) -> None:
    path = saved / "cache.safetensors"
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 25)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        with pytest.raises(CheckpointError):
            runtime.restore_session(saved)
        path.write_bytes(whole[:place])
        with pytest.raises(CheckpointError):
            runtime.restore_session(saved)
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cache\.safetensors"):
        runtime.restore_session(saved)


def test_a_session_of_another_model_is_refused(saved: Path, tmp_path: Path) -> None:
    other = InferenceRuntime(save_tiny(tmp_path / "other", tiny_model(seed=8)), device="cpu")
    with pytest.raises(CheckpointError, match="another model"):
        other.restore_session(saved)
