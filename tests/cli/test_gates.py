"""`fusiontree gates` on a run, on other text, on a pruned export, and on what it refuses."""

import json
from pathlib import Path

import pytest

from fusiontree.data.tokenizer import byte_tokenizer
from tests.cli.conftest import Call
from tests.cli.test_eval import last_line
from tests.deploy import tiny
from tests.eval.subjects import llama


def test_a_run_on_a_text(call: Call, run: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The state is read, and 42 windows move.\n" * 9, encoding="utf-8")
    result = call("gates", run, "--text", text, "--output", tmp_path / "out", "--show", 20)
    assert result.exit_code == 0, result.output
    kept, last = json.loads((tmp_path / "out/gates.json").read_text()), last_line(result.stdout)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "gates.html", "gates.json", "channels.png", "positions.png"
    }  # fmt: skip
    assert last["mean_gate"] == {"0": kept["layers"][0]["gate"]["mean"], "1": kept["layers"][1]["gate"]["mean"]}
    assert len(kept["shown"]["ids"]) == 20 and kept["tokens"] == last["tokens"] > 20
    assert "word" in result.stdout and f"written: {tmp_path}/out/gates.html" in result.stdout.replace("\n", "")


def test_statistics_of_other_text_and_a_pruned_model(call: Call, corpus: Path, tmp_path: Path) -> None:
    cut = tiny.tiny_model(vocab_size=258, layers=[{"mixers": ["mamba"]}, {}], pad_token_id=257, eos_token_id=256,
                          bos_token_id=None)  # fmt: skip
    cut.save_pretrained(tmp_path / "cut")
    byte_tokenizer().save_pretrained(tmp_path / "cut")
    words = ("--data", corpus, "--rows", 3, "--length", 64, "--output", tmp_path / "out")
    result = call("gates", tmp_path / "cut", *words)
    assert result.exit_code == 0, result.output
    kept = json.loads((tmp_path / "out/gates.json").read_text())
    assert kept["rows"] == 3 and kept["layers"][0]["gate"] is None and 0 < kept["layers"][1]["gate"]["mean"] < 1
    assert 30 < len(kept["shown"]["ids"]) <= 64 and " the " in "".join(kept["shown"]["pieces"])
    assert "Mamba alone (pruned)" in (tmp_path / "out/gates.html").read_text(encoding="utf-8")
    assert last_line(result.stdout)["mean_gate"]["0"] is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "give --text FILE, --data FILE, or both"),
        (("--text", "missing.txt"), "--text missing.txt: cannot be read"),
        (("--text", "missing.txt", "--length", 4096), "--length 4096: this model has 256 positions"),
    ],
)
def test_bad_input_is_one_line(call: Call, run: Path, tmp_path: Path, words: tuple, said: str) -> None:
    result = call("gates", run, *words, "--output", tmp_path / "out")
    assert result.exit_code == 2 and said in result.stderr and not (tmp_path / "out").exists()


def test_a_model_without_gates_is_one_line(call: Call, tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "llama")
    result = call("gates", tmp_path / "llama", "--text", __file__, "--output", tmp_path / "out")
    assert result.exit_code == 2 and "a llama model has none; only FusionTree models have" in result.stderr
