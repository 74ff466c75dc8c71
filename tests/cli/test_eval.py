"""`fusiontree eval` on a run, on a model of transformers, and on what it refuses."""

import json
import shutil
from pathlib import Path

import pytest

from fusiontree.train.checkpoint import latest_checkpoint
from tests.cli.conftest import Call
from tests.eval.subjects import llama


def last_line(text: str) -> dict:
    return json.loads(text.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def evaluated(call: Call, run: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    out = tmp_path_factory.mktemp("eval") / "out"
    words = ("eval", run, "--tasks", "perplexity", "--data", corpus, "--lengths", "32,64", "--limit", 3, "--out", out)
    result = call(*words)
    assert result.exit_code == 0, result.output
    return result.stdout, out


def test_a_run_is_evaluated(evaluated: tuple[str, Path], run: Path) -> None:
    stdout, out = evaluated
    found, kept = last_line(stdout), json.loads((out / "results.json").read_text())
    assert "bits_per_byte@64" in stdout and f"results: {out}/results.json" in stdout.replace("\n", "")
    assert found["results"]["perplexity"] == kept["tasks"]["perplexity"]["metrics"] and found["failed"] == {}
    assert kept["model"]["name"] == str(latest_checkpoint(run)) and kept["model"]["fingerprint"] == found["fingerprint"]
    assert kept["tasks"]["perplexity"]["settings"]["lengths"] == [32, 64]
    assert f"picture: {out}/plots/perplexity.png" in stdout and (out / "plots" / "perplexity.png").stat().st_size > 5000


def test_the_same_command_again_asks_nothing_and_says_the_same(
    evaluated: tuple[str, Path], call: Call, run: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stdout, out = evaluated
    monkeypatch.setattr("fusiontree.eval.subject.Subject.score", None)
    words = ("eval", run, "--tasks", "perplexity", "--data", corpus, "--lengths", "32,64", "--limit", 3, "--out", out)
    again = call(*words)
    assert again.exit_code == 0, again.output
    assert last_line(again.stdout) == last_line(stdout)


def test_a_model_of_transformers_with_a_tokenizer_from_elsewhere(
    call: Call, run: Path, corpus: Path, tmp_path: Path
) -> None:
    model = llama()
    model.resize_token_embeddings(300)
    model.save_pretrained(tmp_path / "llama")
    words = (
        "eval",
        tmp_path / "llama",
        "--tokenizer",
        latest_checkpoint(run),
        "--tasks",
        "perplexity",
        "--data",
        corpus,
    )
    result = call(*words, "--lengths", "64", "--limit", 2, "--dtype", "bfloat16", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert last_line(result.stdout)["results"]["perplexity"]["perplexity"] > 1


def test_what_the_tasks_are(call: Call) -> None:
    result = call("eval", "--list")
    assert result.exit_code == 0 and "perplexity" in result.stdout and "--option" in result.stdout


def test_more_than_the_model_is_made_for_is_said(call: Call, run: Path, corpus: Path, tmp_path: Path) -> None:
    words = ("eval", run, "--tasks", "perplexity", "--data", corpus, "--lengths", "512", "--limit", 1)
    result = call(*words, "--max-length", 512, "--out", tmp_path / "out")
    assert result.exit_code == 0 and "512 tokens are more than the 256" in result.stderr


def test_one_task_that_cannot_be_done_leaves_the_others_alone(call: Call, run: Path, tmp_path: Path) -> None:
    result = call(
        "eval", run, "--tasks", "perplexity,copy", "--limit", 2, "--option", "sizes=4", "--out", tmp_path / "o"
    )
    assert result.exit_code == 2
    assert "error: perplexity: " in result.stderr and "--data" in result.stderr
    last = last_line(result.stdout)
    assert set(last["results"]) == {"copy"} and set(last["failed"]) == {"perplexity"}


def test_an_interruption_says_how_to_go_on(
    call: Call, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fusiontree.eval.subject.Subject.continue_ids", interrupt)
    words = ("eval", run, "--tasks", "copy", "--limit", 2, "--option", "sizes=4", "--out", tmp_path / "o")
    result = call(*words)
    assert result.exit_code == 130 and "goes on with what has no answer yet" in result.stderr
    monkeypatch.undo()
    assert call(*words).exit_code == 0


BAD = {
    "unknown task": (("{run}", "--tasks", "perplexity,nonsense"), "nonsense: there is no such task; there are"),
    "no task": (("{run}", "--tasks", ","), "name at least one"),
    "a member of none": (("{run}", "--tasks", "perplexity:a"), "called by its name alone"),
    "no data": (("{run}", "--tasks", "perplexity"), "--data"),
    "missing data": (("{run}", "--tasks", "perplexity", "--data", "nowhere.txt"), "nowhere.txt: no such file"),
    "empty data": (("{run}", "--tasks", "perplexity", "--data", "{tmp}/empty.txt"), "no documents"),
    "too little": (("{run}", "--tasks", "perplexity", "--data", "{tmp}/short.txt", "--lengths", "64"), "needs 65"),
    "too long": (("{run}", "--tasks", "perplexity", "--data", "{corpus}", "--lengths", "1K"), "at most 256 tokens"),
    "no number": (("{run}", "--tasks", "perplexity", "--lengths", "long"), "--lengths long"),
    "no use for it": (("{run}", "--tasks", "perplexity", "--depths", "5"), "--depths: none of perplexity reads it"),
    "no use for that": (("{run}", "--tasks", "perplexity", "--corrected"), "--corrected: none of"),
    "unknown option": (("{run}", "--tasks", "perplexity", "--option", "strid=3"), "stride (tokens"),
    "no option": (("{run}", "--tasks", "perplexity", "--option", "stride"), "KEY=VALUE"),
    "no model": (("./nowhere", "--tasks", "perplexity"), "not a model folder"),
    "no tokenizer": (("{tmp}/bare", "--tasks", "perplexity", "--data", "{corpus}"), "has no tokenizer"),
    "no such device": (("{run}", "--tasks", "perplexity", "--device", "toaster"), "toaster"),
}


@pytest.mark.parametrize(("words", "said"), BAD.values(), ids=BAD.keys())
def test_bad_input_is_one_line(
    words: tuple[str, ...], said: str, call: Call, run: Path, corpus: Path, tmp_path: Path
) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("too short")
    checkpoint = latest_checkpoint(run)
    shutil.copytree(checkpoint, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    before = sorted(tmp_path.rglob("*"))
    places = {"run": run, "corpus": corpus, "tmp": tmp_path}
    result = call("eval", *(word.format(**places) for word in words), "--out", tmp_path / "out")
    assert result.exit_code == 2, result.output
    error = result.stderr.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error, error
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before, "something half-written is left"


def test_grids_become_pictures_and_ruler_has_a_line_over_its_tasks(call: Call, run: Path, tmp_path: Path) -> None:
    words = ("eval", run, "--tasks", "needle_code,ruler:fwe", "--lengths", "1000", "--depths", "0,100", "--limit", 2)
    result = call(*words, "--max-length", 1000, "--option", "new_tokens=2", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    picture = tmp_path / "out" / "plots" / "needle_code_grid.png"
    assert picture.stat().st_size > 5000 and f"picture: {picture}" in result.stdout.replace("\n", "")
    assert last_line(result.stdout)["groups"] == {"ruler": {"effective_length": 0, "score@1000": 0.0}}
    assert "all ruler" in result.stdout and "1 of 13 tasks" in result.stdout
    assert (tmp_path / "out" / "plots" / "ruler_grid.png").exists()
