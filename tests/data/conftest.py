"""Every test here has its own cache folder and writes its files with one helper."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from hypothesis import settings
from transformers import PreTrainedTokenizerFast

from fusiontree.data import byte_tokenizer

settings.register_profile("patient", deadline=None)  # a busy machine is not a failure
settings.load_profile("patient")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("FUSIONTREE_CACHE", str(folder))
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture
def jsonl(tmp_path: Path) -> Callable[..., str]:
    """Write texts as a JSONL file and return its path."""

    def write(texts: Sequence[str], name: str = "text.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        return str(path)

    return write
