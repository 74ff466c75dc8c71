"""Bad input is one line on standard error and exit code 2; Ctrl-C says how to go on; help needs no torch."""

import subprocess
import sys
from pathlib import Path

import pytest

from fusiontree.errors import DataError
from tests.cli.conftest import Call

BAD_CALLS = {
    "no such config": ("train", "nowhere.yaml"),
    "unknown key": ("train", "{config}", "training.learning=1"),
    "wrong type": ("train", "{config}", "training.steps=many"),
    "no override": ("train", "{config}", "training.steps"),
    "heads do not divide": ("train", "{config}", "model.num_attention_heads=5"),
    "no such data": ("train", "{config}", "data.train=[{{path: nowhere.txt}}]", "system.run_dir={tmp}/run"),
    "prune: no such model": ("prune", "nowhere", "--max-loss-increase", "1", "--out", "{tmp}/plan.json"),
    "prune: empty run": ("prune", "{tmp}/empty", "--max-loss-increase", "1", "--out", "{tmp}/plan.json"),
    "prune: negative budget": ("prune", "{run}", "--max-loss-increase", "-1", "--out", "{tmp}/plan.json"),
    "prune: no such text": ("prune", "{run}", "--data", "nowhere", "--max-loss-increase", "1", "--out", "{tmp}/p.json"),
    "prune: too long": ("prune", "{run}", "--max-loss-increase", "1", "--length", "257", "--out", "{tmp}/plan.json"),
    "export: no plan": ("export", "{run}", "--plan", "nowhere.json", "--out", "{tmp}/out"),
    "export: not a plan": ("export", "{run}", "--plan", "{config}", "--out", "{tmp}/out"),
    "generate: no model": ("generate", "{tmp}", "--prompt", "a"),
    "generate: empty prompt": ("generate", "{run}", "--prompt", ""),
    "generate: temperature": ("generate", "{run}", "--prompt", "a", "--temperature", "-1"),
    "generate: too long": ("generate", "{run}", "--prompt", "a", "--max-new-tokens", "100000"),
    "generate: no such device": ("generate", "{run}", "--prompt", "a", "--device", "toaster"),
    "chat: no model": ("chat", "{tmp}"),
    "info: nothing there": ("info", "nowhere"),
    "info: not a model": ("info", "{tmp}"),
    "convert: no such model": ("convert", "nowhere", "{tmp}/out"),
    "convert: a config": ("convert", "{config}", "{tmp}/out"),
    "info: nothing named": ("info",),
    "info: no such preset": ("info", "--preset", "gpt9"),
    "info: no such size": ("info", "--preset", "llama", "--params", "ten"),
    "info: no solution": ("info", "--preset", "llama", "--params", "1K"),
    "info: unknown setting": ("info", "--preset", "llama", "hiden=3"),
    "report: not a run": ("report", "{tmp}"),
    "report: nothing there": ("report", "nowhere"),
    "runs: nothing there": ("runs", "nowhere"),
    "compare: no such grid": ("compare", "nowhere.yaml", "--out", "{tmp}/grid"),
    "compare: no such preset": ("compare", "--architectures", "rnn", "--out", "{tmp}/grid"),
    "compare: no such component": ("compare", "model.norm_placement=aside", "--out", "{tmp}/grid"),
    "compare: no such size": ("compare", "--params", "10", "--out", "{tmp}/grid"),
    "compare: not a size": ("compare", "--params", "big", "--out", "{tmp}/grid"),
    "compare: other vocabulary": ("compare", "model.vocab_size=77", "--out", "{tmp}/grid"),
    "compare: not a grid's folder": ("compare", "--out", "{run}"),
    "compare: no such text": ("compare", "--text", "nowhere.txt", "--out", "{tmp}/grid"),
    "ablate: no such change": ("ablate", "--changes", "no_gates", "--out", "{tmp}/grid"),
    "ablate: no such preset": ("ablate", "--base", "rnn", "--out", "{tmp}/grid"),
    "tokenizer: no text": ("tokenizer", "train", "nowhere.txt", "--out", "{tmp}/tokenizer"),
    "tokenizer: too small": ("tokenizer", "train", "{config}", "--vocab-size", "10", "--out", "{tmp}/tokenizer"),
    "tokenizer: empty path": ("tokenizer", "train", "", "--out", "{tmp}/tokenizer"),
    "eval: no such model": ("eval", "./nowhere", "--tasks", "copy", "--out", "{tmp}/results"),
    "eval: unknown task": ("eval", "{run}", "--tasks", "nonsense", "--out", "{tmp}/results"),
    "eval: missing data": ("eval", "{run}", "--tasks", "leval:tpo", "--data", "nowhere", "--out", "{tmp}/results"),
    "eval: too long": ("eval", "{run}", "--tasks", "needle", "--lengths", "64K", "--out", "{tmp}/results"),
    "data: no such corpus": ("data", "download", "mywiki", "--out", "{tmp}/w.jsonl"),
    "data: no hub": ("data", "download", "wikipedia", "--out", "{tmp}/w.jsonl"),
    "data: nothing to inspect": ("data", "inspect", "nowhere.txt"),
    "data: no tokenizer": ("data", "prepare", "{config}", "--tokenizer", "./nowhere", "--out", "{tmp}/tokens"),
}


@pytest.mark.parametrize("words", BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_bad_input_is_one_line(words: tuple[str, ...], call: Call, config: Path, run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    before = sorted(tmp_path.rglob("*"))
    result = call(*(word.format(config=config, run=run, tmp=tmp_path) for word in words))
    assert result.exit_code == 2, result.output
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ") and len(last) > len("error: ")
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before, "something half-written is left"


def test_a_bug_keeps_its_traceback(call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("fusiontree.lab.report.write_report", lambda _: 1 / 0)
    assert isinstance(call("report", tmp_path).exception, ZeroDivisionError)


def test_an_error_of_several_lines_is_printed_as_one(
    call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(_: Path) -> None:
        raise DataError("first\n  second")

    monkeypatch.setattr("fusiontree.lab.report.write_report", fail)
    assert call("report", tmp_path).stderr == "error: first second\n"


@pytest.mark.parametrize("told", ["", "interrupted; 3 measurements are kept"])
def test_ctrl_c_says_how_to_go_on(told: str, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt(told) if told else KeyboardInterrupt

    monkeypatch.setattr("fusiontree.recipes.demo.run_demo", interrupt)
    result = call("demo", "--out", tmp_path)
    assert result.exit_code == 130
    assert (told or "run the same command again") in result.stderr


def test_help_names_every_verb_and_waits_for_no_heavy_import() -> None:
    code = (
        "import sys, typer\nfrom fusiontree.cli.main import app\n"
        "from typer.testing import CliRunner\nprint(CliRunner().invoke(app, ['--help']).output)\n"
        "heavy = {'torch', 'transformers', 'numpy', 'pydantic', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for verb in ("train", "prune", "export", "generate", "chat", "info", "report", "runs", "demo", "tokenizer", "data"):
        assert f" {verb} " in done.stdout


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fusiontree", "info", "nowhere"], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: nowhere: not a YAML config, a model folder or a run folder\n"
