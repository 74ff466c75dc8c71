"""The probes of a run from its settings: what they ask, of which text, and that they measure what they say."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from fusiontree.data import byte_tokenizer
from fusiontree.errors import ConfigError, DataError
from fusiontree.recipes.probes import PerplexityProbe, training_probes
from fusiontree.recipes.slim import healing_config
from fusiontree.train import train
from fusiontree.train.build import build_model
from fusiontree.train.config import RunConfig
from fusiontree.train.losses import target_mask
from tests.train.tiny import lines, tiny_config


def settings(folder: Path, **changes: Any) -> RunConfig:
    """Held-out text of some thousand tokens, and the tokenizer where a run keeps it."""
    byte_tokenizer().save_pretrained(folder / "run" / "tokenizer")
    return tiny_config(folder, **{"probes__every": 4, "data__validation_fraction": 0.5, **changes})


def test_a_run_measures_what_its_settings_say(tmp_path: Path) -> None:
    config = settings(tmp_path, probes__recall_pairs=[2, 6], probes__recall_questions=8, probes__perplexity_tokens=64)
    train(config, probes=training_probes(config))
    found = [line for line in lines(tmp_path / "run") if "recall/2" in line]
    assert [line["step"] for line in found] == [0, 4, 8]
    assert set(found[0]) == {"step", "perplexity/8", "perplexity/32", "recall/2", "recall/6"}
    assert found[0]["perplexity/32"] == pytest.approx(258, rel=0.2) and found[0]["recall/6"] <= 0.2
    assert found[-1]["perplexity/32"] < found[0]["perplexity/32"] / 2


def test_nothing_is_measured_unless_asked(tmp_path: Path) -> None:
    assert training_probes(tiny_config(tmp_path)) == {}
    both = training_probes(settings(tmp_path))
    assert list(both) == ["perplexity", "recall"]
    assert list(training_probes(settings(tmp_path, probes__recall_pairs=[]))) == ["perplexity"]
    assert list(training_probes(settings(tmp_path, probes__perplexity_lengths=[]))) == ["recall"]


def test_so_many_values_are_asked_for(tmp_path: Path) -> None:
    probe = training_probes(settings(tmp_path, probes__recall_pairs=[2, 8], probes__recall_questions=20))["recall"]
    rows = {count: tuple(rows.shape) for count, rows in probe._probe.rows.items()}  # type: ignore[union-attr]
    assert rows == {2: (10, 8), 8: (3, 32)}


@pytest.mark.parametrize("packing", [True, False])
def test_every_length_reads_the_same_text(tmp_path: Path, packing: bool) -> None:
    sizes = {"probes__perplexity_lengths": [128, 16, 64], "probes__perplexity_tokens": 300, "data__packing": packing}
    probe = PerplexityProbe(settings(tmp_path, **sizes))
    text = {length: [batch["input_ids"] for batch in batches] for length, batches in probe._text.items()}
    assert list(text) == [16, 64, 128]
    whole = {length: torch.cat(pieces).flatten().tolist() for length, pieces in text.items()}
    assert whole[16] == whole[64] == whole[128] and len(whole[16]) == 3 * 128
    assert all(piece.numel() <= 128 and piece.shape[1] == length for length in text for piece in text[length])


def test_perplexity_is_that_of_the_model_on_that_text(tmp_path: Path) -> None:
    probe = PerplexityProbe(settings(tmp_path, probes__perplexity_lengths=[32]))
    model = build_model(tiny_config(tmp_path, model__vocab_size=258)).eval()
    total = count = 0.0
    with torch.no_grad():
        found = probe(model)["32"]
        for batch in probe._text[32]:
            logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[:, :-1]
            chosen = logits.log_softmax(-1).gather(-1, batch["input_ids"][:, 1:, None])[..., 0]
            mask = target_mask(batch)
            total, count = total - float(chosen[mask].sum()), count + int(mask.sum())
    assert count > 100 and found == pytest.approx(math.exp(total / count), rel=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"probes__every": 0}, "probes.every"),
        ({"probes__often": 1}, "probes.often: unknown key"),
        ({"probes__perplexity_lengths": [48, 64]}, "48 does not divide the longest, 64"),
        ({"probes__perplexity_lengths": [4096]}, "perplexity_lengths: makes rows of 4096"),
        ({"probes__recall_pairs": [600]}, "recall_pairs: makes rows of 2400; model.max_position_embeddings is 2048"),
        ({"model__max_position_embeddings": 32}, "recall_pairs: makes rows of 64"),
        ({"data__validation_fraction": 0.0}, "nothing is held out"),
        ({"training__spike_factor": 1.0}, "training.spike_factor"),
        ({"training__spike_factor": 3.0, "training__spike_stop": 2.0}, "spike_stop 2.0 is less than spike_factor 3.0"),
    ],
)
def test_impossible_settings_are_named(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings(tmp_path, **changes)
    assert expected in str(caught.value)
    if "probes__every" not in changes and all(name.startswith(("probes", "data")) for name in changes):
        settings(tmp_path, **{"probes__every": None, **{k: v for k, v in changes.items() if "often" not in k}})


def test_too_many_pairs_stop_the_run_before_its_first_step(tmp_path: Path) -> None:
    config = settings(tmp_path, probes__recall_pairs=[30])
    with pytest.raises(DataError, match="30 pairs need 60 tokens"):
        train(config, probes=training_probes(config))
    assert not [line for line in lines(tmp_path / "run") if "loss" in line]


def test_healing_is_not_probed(tmp_path: Path) -> None:
    assert healing_config(settings(tmp_path), tmp_path, steps=2, lr=1e-3).probes.every is None
