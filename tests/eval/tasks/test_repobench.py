import json

import pytest

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.run import evaluate
from fusiontree.eval.task import Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.repobench import RepoBench, build_prompt
from tests.eval.subjects import subject


def text(length=8192):
    return TokenText(byte_tokenizer(), length)


def record(**changes):
    base = {
        "repo_name": "o/r",
        "file_path": "pkg/a.py",
        "context": [{"path": "pkg/b.py", "snippet": "def f():\n    pass", "identifier": "f"}],
        "import_statement": "from pkg.b import f",
        "cropped_code": "def g():\n    x = 1\n\n  ",
        "next_line": "    return f()",
        "level": "2k",
        "created_at": "2023-12-05T10:00:00",
    }
    return base | changes


def folder(path, **rows):
    path.mkdir(exist_ok=True)
    for name in ("cross_file_first", "cross_file_random", "in_file"):
        lines = rows.get(name, [record()])
        (path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


OWN = "# Path: pkg/a.py\nfrom pkg.b import f\ndef g():\n    x = 1\n"


def test_the_prompt_has_the_snippets_then_the_file():
    assert build_prompt(record(), "python", text(), 1000) == (
        "# Repo Name: o/r\n# Path: pkg/b.py\ndef f():\n    pass\n\n" + OWN
    )
    assert build_prompt(record(), "java", text(), 1000).startswith("// Repo Name: o/r\n// Path: pkg/b.py\n")


def test_four_line_breaks_become_two():
    wide = record(context=[{"path": "b", "snippet": "x\n\n\ny\n\n\n\nz"}])
    assert build_prompt(wide, "python", text(), 1000).split("b\n")[1].startswith("x\n\n\ny\n\nz")


def test_lines_go_from_the_end_of_the_snippets():
    # 17 + 17 + 9 + 8 + 2 breaks of snippets and 57 of the file make 109 tokens of a byte. With 100 allowed 9 are too
    # many: dropped are "", "", "" (0 each), "    pass" (8: 1 too many) and "def f():" (8: below 0).
    assert len(build_prompt(record(), "python", text(), 1000)) == 109
    assert build_prompt(record(), "python", text(), 100) == "# Repo Name: o/r\n# Path: pkg/b.py\n\n" + OWN
    # The file's own part stays, whatever the limit.
    assert build_prompt(record(), "python", text(), 1) == "\n\n" + OWN


def test_settings_come_in_turn_and_levels_and_dates_are_chosen(tmp_path):
    rows = [
        record(),
        record(level="64k"),
        record(created_at="2023-11-30 23:59:59"),
        record(created_at="2023-12-31 00:00:01"),  # after the last day's midnight
        record(created_at="2023-12-31 00:00:00", level="4k"),
    ]
    settings = TaskSettings(data=folder(tmp_path / "d", in_file=rows), limit=4)
    samples = list(RepoBench("python").samples(text(), settings))
    assert [sample.id for sample in samples] == [
        "cross_file_first/0", "cross_file_random/0", "in_file/0", "in_file/1",
    ]  # fmt: skip
    assert samples[-1].facts["level"] == "4k"
    assert (samples[0].max_new_tokens, samples[0].chat) == (128, False)
    only = TaskSettings(
        data=settings.data, options={"settings": "in_file", "levels": "64k", "dates": "2023-01-01..2024-01-01"}
    )
    assert [sample.id for sample in RepoBench("python").samples(text(), only)] == ["in_file/0"]


def test_the_files_of_a_language_may_lie_in_its_folder(tmp_path):
    (tmp_path / "d").mkdir()
    folder(tmp_path / "d" / "java")
    folder(tmp_path / "d" / "python")
    samples = list(RepoBench("java").samples(text(), TaskSettings(data=tmp_path / "d")))
    assert samples[0].prompt.startswith("// Repo Name")


def test_totals_weight_the_settings_by_their_samples(tmp_path):
    data = folder(tmp_path / "d", in_file=[record(), record(level="4k"), record(level="4k")])
    task = RepoBench("python")
    samples = list(task.samples(text(), TaskSettings(data=data)))
    answers = {
        "cross_file_first/0": "# so:\n    return f()",
        "cross_file_random/0": "return f()",  # equal but for blanks
        "in_file/0": "    return g()",
        "in_file/1": "",
        "in_file/2": "    return g()\nmore",
    }
    found = task.summarise([Scored(s, answers[s.id], task.score(s, answers[s.id])) for s in samples])
    metrics = found["metrics"]
    # 14 characters against 10, all ten common: 20 / 24; "return g()" with its indentation 26 / 28.
    assert metrics["cross_file_random/edit_similarity"] == 83.0
    assert metrics["in_file/edit_similarity"] == round((93 + 0 + 93) / 3, 2)
    assert metrics["cross_file_first/exact_match"] == 100.0
    assert metrics["in_file/exact_match"] == 0.0
    assert metrics["exact_match"] == 40.0
    assert metrics["edit_similarity"] == round((100 + 83 + 3 * 62) / 5, 2)
    assert found["tables"]["level"] == [
        {"level": "2k", "samples": 3, "exact_match": 66.67, "edit_similarity": 92.0},
        {"level": "4k", "samples": 2, "exact_match": 0.0, "edit_similarity": 46.5},
    ]


def test_a_file_too_long_for_the_model_is_refused_or_keeps_its_end(tmp_path):
    data = folder(tmp_path / "d", cross_file_first=[record(cropped_code="x = 1\n" * 100 + "last = 2")])
    with pytest.raises(DataError, match=r"pkg/a\.py has 648 tokens .* the model takes 372; .*overlong=keep_end"):
        next(RepoBench("python").samples(text(500), TaskSettings(data=data)))
    settings = TaskSettings(data=data, options={"overlong": "keep_end"})
    sample = next(RepoBench("python").samples(text(500), settings))
    assert len(sample.prompt) == 372
    assert sample.prompt.endswith("x = 1\nlast = 2\n")
    assert sample.facts["own part cut"] is True


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": "3k"}, "levels=3k: allowed, with commas: 2k, 4k"),
        ({"settings": ""}, "allowed, with commas: cross_file_first"),
        ({"overlong": "cut"}, "overlong=cut: allowed: refuse, keep_end"),
        ({"dates": "2023"}, "dates=2023: allowed: YYYY"),
    ],
)
def test_bad_options_are_named(tmp_path, options, message):
    settings = TaskSettings(data=folder(tmp_path / "d"), options=options)
    with pytest.raises(ConfigError, match=message):
        next(RepoBench("python").samples(text(), settings))


def test_nothing_left_is_an_error(tmp_path):
    settings = TaskSettings(data=folder(tmp_path / "d"), options={"levels": "16k"})
    with pytest.raises(DataError, match="cross_file_first has no records of the levels 16k"):
        next(RepoBench("python").samples(text(), settings))
    with pytest.raises(DataError, match="nothing was scored"):
        RepoBench("python").summarise([])


def test_a_model_is_asked_and_scored(tmp_path):
    settings = TaskSettings(data=folder(tmp_path / "d"))
    outcome = evaluate(subject("hybrid", 256), [RepoBench("python")], settings, tmp_path / "out")
    assert not outcome.failed
    assert outcome.results["repobench:python"]["samples"] == 3
