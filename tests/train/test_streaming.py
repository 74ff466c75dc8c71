"""A run on a stream and a file goes on from a checkpoint as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path

from fusiontree.train import train
from tests.train.test_resume import StopAfter
from tests.train.tiny import lines, tiny_config, write_text


def test_a_resumed_run_on_a_mixture_with_a_stream_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    texts = write_text(tmp_path / "other.txt", seed=5).read_text().split("\n\n")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_text(tmp_path / "text.txt")
    sources = [
        {"path": str(tmp_path / "text.txt"), "separator": "\n\n", "weight": 1.0},
        {"path": str(tmp_path / "a.jsonl"), "mode": "streaming", "weight": 1.0},
    ]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(tiny_config(tmp_path, system__run_dir=str(whole), data__train=sources))
    for stop in (3, 5):
        config = tiny_config(tmp_path, system__run_dir=str(parts), data__train=sources)
        train(config, callbacks=[StopAfter(stop)])
    train(tiny_config(tmp_path, system__run_dir=str(parts), data__train=sources, data__num_workers=2))
    assert lines(whole) == lines(parts)
