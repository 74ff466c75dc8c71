"""Corpora and tokenizers by name, from a small hub through the libraries and the network that are really used."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.data.hub import TEXTS

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hub")


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.data.hub", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    outcomes: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return outcomes


def texts(path: Path) -> list[str]:
    return [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_corpus_comes_in_the_language_asked_for(found, folder: Path) -> None:
    assert texts(folder / "all.jsonl") == TEXTS and found["documents"] == 40
    assert texts(folder / "some.jsonl") == TEXTS[:7]


def test_a_download_that_breaks_off_is_named_and_goes_on(found, folder: Path) -> None:
    assert found["broken"].startswith("DataError: wikimedia/wikipedia: cannot be read after record 25: ")
    assert found["part"] == 20, "whole batches are kept"
    assert texts(folder / "broken.jsonl") == TEXTS
    assert not list(folder.glob("*.part*"))


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("no language", "'20231101.xx' not found. Available: ['20231101.zh', '20231101.en']"),
        ("no corpus", "doesn't exist on the Hub"),
        ("gated", "must be authenticated"),
    ],
)
def test_what_the_hub_refuses_is_one_line(found, case: str, reason: str) -> None:
    assert ": cannot be opened on the Hugging Face hub: " in found[case] and reason in found[case]
    assert "\n" not in found[case]


def test_a_training_stream_from_the_hub_resumes(found) -> None:
    assert found["goes on"] is True


def test_a_tokenizer_is_fetched_only_when_that_is_allowed(found) -> None:
    assert "allow tokenizer.download" in found["tokenizer not asked for"]
    assert found["tokenizer"] is True
