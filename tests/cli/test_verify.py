"""`fusiontree verify`: exit codes, table, file and last line."""

import json
from pathlib import Path

import pytest
from transformers import GPT2Config, GPT2LMHeadModel

from fusiontree.data.tokenizer import byte_tokenizer
from tests.cli.conftest import Call
from tests.cli.test_eval import last_line
from tests.eval.subjects import hybrid, llama, sharpened


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models")
    hybrid().save_pretrained(path / "ours")
    byte_tokenizer().save_pretrained(path / "ours")
    llama().save_pretrained(path / "llama")
    gpt2 = GPT2Config(vocab_size=258, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=1, eos_token_id=1)
    sharpened(GPT2LMHeadModel(gpt2)).save_pretrained(path / "gpt2")
    return path


def test_ours_holds(call: Call, folder: Path, tmp_path: Path) -> None:
    words = ("--device", "cpu", "--length", 24, "--output", tmp_path / "found.json")
    result = call("verify", folder / "ours", *words)
    assert result.exit_code == 0, result.output
    last, kept = last_line(result.stdout), json.loads((tmp_path / "found.json").read_text())
    assert last["broken"] == [] and {"cached", "packed", "pruned", "saved", "bf16"} <= set(last["holds"])
    assert [line["name"] for line in kept["lines"] if line["status"] == "holds"] == last["holds"]
    assert kept["fingerprint"] == last["fingerprint"] and kept["provenance"]["versions"]["transformers"]
    assert kept["command"].startswith("fusiontree") and kept["length"] == 24
    assert "pruned" in result.stdout and f"written: {tmp_path}/found.json" in result.stdout


def test_what_is_broken_is_exit_code_1(call: Call, folder: Path) -> None:
    words = ("--device", "cpu", "--length", 24, "--lines", "padded_unnumbered, left_padded,pruned")
    result = call("verify", folder / "gpt2", *words)
    assert result.exit_code == 1, result.output
    last = last_line(result.stdout)
    assert (last["holds"], last["broken"], last["not offered"]) == (["left_padded"], ["padded_unnumbered"], ["pruned"])
    table = result.stdout.rpartition("{")[0]
    assert table.index("left_padded") < table.index("holds") < table.index("broken") < table.index("not offered")


def test_a_text_is_read(call: Call, folder: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("The state is read, and a window moves. " * 6, encoding="utf-8")
    words = ("--device", "cpu", "--lines", "cached", "--text", text)
    assert call("verify", folder / "ours", *words, "--length", 24).exit_code == 0
    result = call("verify", folder / "ours", *words, "--length", 97)
    assert result.exit_code == 2 and "234 tokens; 8 rows of 97 need 776" in result.stderr
    result = call("verify", folder / "llama", *words, "--length", 24)
    assert result.exit_code == 2 and "has no tokenizer" in result.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("gpt2", "--length", 60), "--length 60: with 8 generated tokens more than the model's 64"),
        (("ours", "--lines", "speed"), "--lines speed: there is no such line; there are context, causal"),
        (("nowhere",), "not a model folder"),
        (("ours", "--text", "missing.txt"), "--text missing.txt: cannot be read"),
    ],
)
def test_bad_input_is_one_line(call: Call, folder: Path, words: tuple, said: str) -> None:
    result = call("verify", folder / words[0], *words[1:], "--device", "cpu")
    assert result.exit_code == 2 and said in result.stderr
    assert result.stderr.strip().splitlines()[-1].startswith("error: ")


def test_the_lines_are_listed(call: Call) -> None:
    result = call("verify", "--list")
    assert result.exit_code == 0 and "packed" in result.stdout and "GPU = CPU" in result.stdout
