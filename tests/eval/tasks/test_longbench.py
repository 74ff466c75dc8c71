import hashlib
import json
from dataclasses import replace
from importlib.resources import files

import pytest

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.run import evaluate
from fusiontree.eval.task import Sample, Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.fit import shortened, without_middle
from fusiontree.eval.tasks.longbench import (
    BUCKETS,
    CATEGORIES,
    CHINESE,
    EXTENDED,
    RULES,
    LongBench,
    overall,
    overall_by_length,
)
from fusiontree.eval.tasks.longbench_prompts import official_templates, template
from fusiontree.eval.tasks.longbench_v2 import LongBenchV2
from tests.eval.subjects import subject

# SHA-256, first 16 digits, of each template in the authors' file (January 2025).
OFFICIAL = {
    "narrativeqa": "aada7ed24b06abac",
    "qasper": "0fbdd123fe7f83d6",
    "multifieldqa_en": "20b4666a2de8a1f7",
    "multifieldqa_zh": "344b3a4e557cd547",
    "hotpotqa": "9ec4ae308865bd0c",
    "2wikimqa": "9ec4ae308865bd0c",
    "musique": "9ec4ae308865bd0c",
    "dureader": "ae53329f51b17908",
    "gov_report": "91c25d585b189ced",
    "qmsum": "dca23b678fe0183b",
    "multi_news": "2af3f28c40b902e6",
    "vcsum": "3e5d8241bc9b512e",
    "trec": "0eff8bebdba99d91",
    "triviaqa": "00a802e6377e72fc",
    "samsum": "a68d884234907eef",
    "lsht": "f3edabdf7fae53d6",
    "passage_count": "986550b6c61009c6",
    "passage_retrieval_en": "39b96b7fa52bdd2a",
    "passage_retrieval_zh": "c1e2346e245eb365",
    "lcc": "6a1f24cf0bb83cd9",
    "repobench-p": "ee9ec182ea5ffeb7",
}
FORM = "Text: {context}\n\nQ: {input}\nA:"


def text(length=4096):
    return TokenText(byte_tokenizer(), length)


def record(**changes):
    base = {"input": "who?", "context": "Ann met Bo. " * 3, "answers": ["Ann", "Ann Lee"], "length": 9}
    return base | {"dataset": "qasper", "language": "en", "all_classes": None, "_id": "x1"} | changes


def folder(path, name="qasper", rows=None, form=FORM):
    path.mkdir(exist_ok=True)
    rows = [record()] if rows is None else rows
    (path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (path / "forms.json").write_text(json.dumps(dict.fromkeys(OFFICIAL, form)))
    return path


def settings(data, **options):
    """With the short templates of `folder`."""
    return TaskSettings(data=data, options={"templates": str(data / "forms.json"), **options})


def scored(task, *pairs, **facts):
    base = {"length": 1, "classes": [], "official": True, "edit": "levenshtein", "template": True, "cut": False}
    samples = [Sample(str(n), "", gold, 8, facts=base | facts) for n, (_, gold) in enumerate(pairs)]
    return [
        Scored(sample, output, task.score(sample, output)) for sample, (output, _) in zip(samples, pairs, strict=True)
    ]


def test_there_are_21_tasks_and_13_by_length():
    assert len(RULES) == 21
    assert set(OFFICIAL) == set(RULES)
    assert len(EXTENDED) == 13
    assert set(EXTENDED) < set(RULES)


def test_a_prompt_is_the_template_filled(tmp_path):
    task = LongBench("qasper")
    data = folder(tmp_path / "d", rows=[record(context="{input} {", answers=["a", "b"])])
    (sample,) = task.samples(text(), settings(data))
    assert sample.prompt == "Text: {input} {\n\nQ: who?\nA:"  # braces in a document mean nothing
    assert sample.references == ("a", "b")
    assert (sample.id, sample.max_new_tokens, sample.stop, sample.chat) == ("0", 128, (), True)
    assert sample.facts["template"] is False
    assert sample.facts["cut"] is False
    json.dumps(dict(sample.facts))


def test_only_some_tasks_are_put_into_a_chat_and_samsum_stops_at_a_line_break(tmp_path):
    assert {name for name, rules in RULES.items() if not rules.chat} == {
        "trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p",
    }  # fmt: skip
    (sample,) = LongBench("samsum").samples(text(), settings(folder(tmp_path / "d", "samsum")))
    assert (sample.stop, sample.never_empty, sample.chat) == (("\n",), True, False)


def test_the_middle_is_left_out():
    # 20 bytes, one token each: with 9 allowed int(9 / 2) = 4 stay at each end.
    assert without_middle(text(), "abcdefghijklmnopqrst", 9) == "abcdqrst"
    assert without_middle(text(), "abcdefgh", 8) == "abcdefgh"


def test_a_long_prompt_is_cut_to_the_room_there_is_or_to_what_is_said(tmp_path):
    data = folder(tmp_path / "d", rows=[record(context="c" * 5000)])
    (sample,) = LongBench("qasper").samples(text(512), settings(data))
    assert len(text().chat(sample.prompt)) == 512 - 128  # the chat template's own text has its room
    assert sample.prompt.startswith("Text: ccc")
    assert sample.prompt.endswith("cc\n\nQ: who?\nA:")
    assert sample.facts["cut"] is True
    (sample,) = LongBench("qasper").samples(text(512), settings(data, prompt_tokens="101"))
    assert len(sample.prompt) == 100
    with pytest.raises(ConfigError, match="prompt_tokens=385: allowed: 2 to 384"):
        next(LongBench("qasper").samples(text(512), settings(data, prompt_tokens="385")))
    with pytest.raises(DataError, match="answer may take 128 tokens, the model sees no more than 100"):
        next(LongBench("qasper").samples(text(100), settings(data)))


def test_what_grows_when_it_is_read_again_is_cut_once_more():
    class Growing(TokenText):
        def count(self, text):
            return 2 * len(text)

    grown = Growing(byte_tokenizer(), 100)
    assert shortened(grown, lambda limit: "x" * limit, 60, 60, False) == "x" * 30
    assert shortened(text(), lambda limit: "x" * limit, 60, 60, True) == "x" * (60 - len(text().chat("")))
    with pytest.raises(DataError, match="does not fit into 5 tokens"):
        shortened(grown, lambda limit: "a whole prompt", 60, 5, False)


def test_the_first_line_alone_counts_for_four_tasks():
    task = LongBench("triviaqa")
    assert task.score(scored(task, ("", ("Ann",)))[0].sample, "\n\nAnn\nBo Bo") == {"score": 1.0}
    task = LongBench("qasper")
    assert task.score(scored(task, ("", ("Ann",)))[0].sample, "Ann\nBo Bo") == {"score": 0.5}


def test_the_best_gold_answer_counts_and_the_mean_has_two_decimals():
    task = LongBench("hotpotqa")
    found = task.summarise(scored(task, ("Ann", ("Bo", "Ann")), ("x", ("Ann",)), ("x", ("Ann",)), ("Ann", ())))
    assert found["metrics"] == {"score": 25.0}
    assert found["tables"]["prompts"] == {"official templates": True, "cut in the middle": 0, "samples": 4}
    found = task.summarise(scored(task, *[("Ann", ("Ann",))] * 2, ("x", ("Ann",))))
    assert found["metrics"] == {"score": 66.67}


def test_classes_and_code_follow_the_settings():
    task = LongBench("trec")
    classes = ["date", "birth", "date of birth"]
    pair = ("date of birth", ("date of birth",))
    assert scored(task, pair, classes=classes)[0].scores == {"score": 0.5}
    assert scored(task, pair, classes=classes, official=False)[0].scores == {"score": 1.0}
    task = LongBench("lcc")
    pair = ("# so\na1b2c3zz\nmore", ("zzabc",))
    assert scored(task, pair)[0].scores == {"score": 0.46}
    assert scored(task, pair, edit="difflib")[0].scores == {"score": 0.31}


@pytest.mark.parametrize(
    ("dataset", "output", "gold"),
    [
        ("passage_count", "12", "12"),
        ("passage_retrieval_en", "Paragraph 4", "Paragraph 4"),
        ("passage_retrieval_zh", "4", "段落4"),
        ("gov_report", "a b", "a b"),
        ("vcsum", "会议总结", "会议总结"),
        ("multifieldqa_zh", "北京", "北京"),
        ("repobench-p", "x = 1", "x = 1"),
        ("samsum", "Ann left.", "Ann left."),
    ],
)
def test_the_right_answer_scores_one(dataset, output, gold):
    task = LongBench(dataset)
    (right,) = scored(task, (output, (gold,)))
    (wrong,) = scored(task, ("", (gold,)))
    assert right.scores["score"] == pytest.approx(1.0, abs=1e-7)
    assert wrong.scores["score"] == 0.0


def test_scores_by_length_and_an_empty_length():
    task = LongBench("qasper", extended=True)
    rows = [
        replace(each, sample=replace(each.sample, facts={**each.sample.facts, "length": length}))
        for each, length in zip(
            scored(task, ("Ann", ("Ann",)), ("x", ("Ann",)), ("Ann", ("Ann",))), (3999, 8000, 9000), strict=True
        )
    ]
    found = task.summarise(rows)
    assert found["metrics"] == {"score": 66.67, "0-4k": 100.0, "4-8k": None, "8k+": 50.0}
    assert [row["samples"] for row in found["tables"]["lengths"]] == [1, 0, 2]
    assert task.name == "longbench_e:qasper"


def test_the_extended_file_is_read(tmp_path):
    data = folder(tmp_path / "d", "qasper_e")
    assert len(list(LongBench("qasper", extended=True).samples(text(), TaskSettings(data=data)))) == 1
    with pytest.raises(DataError, match=r"no file qasper\.jsonl.*huggingface.co/datasets/THUDM/LongBench"):
        next(LongBench("qasper").samples(text(), TaskSettings(data=data)))


def test_bad_records_and_options_are_named(tmp_path):
    data = folder(tmp_path / "d", rows=[record(answers="Ann")])
    with pytest.raises(DataError, match="`answers` must be a list"):
        next(LongBench("qasper").samples(text(), TaskSettings(data=data)))
    with pytest.raises(ConfigError, match=r"edit=fuzzy: allowed: levenshtein, difflib"):
        next(LongBench("lcc").samples(text(), TaskSettings(data=data, options={"edit": "fuzzy"})))


def test_the_templates_that_come_with_the_package_are_the_authors_to_the_letter():
    found = {name: hashlib.sha256(text.encode()).hexdigest()[:16] for name, text in official_templates().items()}
    assert found == OFFICIAL
    content = json.loads((files("fusiontree.eval.tasks") / "data" / "longbench_prompts.json").read_text("utf-8"))
    assert "MIT License" in content["licence"] and "https://github.com/THUDM/LongBench" in content["origin"]


def test_without_a_file_of_templates_the_official_ones_are_used(tmp_path):
    (sample,) = LongBench("qasper").samples(text(9000), TaskSettings(data=folder(tmp_path / "d")))
    assert sample.prompt.startswith("You are given a scientific article") and sample.facts["template"] is True
    assert record()["context"] in sample.prompt and sample.prompt.endswith("Question: who?\n\nAnswer:")


def test_templates_of_a_file(tmp_path):
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"qasper": "{context} mine", "trec": official_templates()["trec"], "lcc": "{input}"}))
    assert template("qasper", str(mine)) == ("{context} mine", False)
    assert template("trec", str(mine)) == template("trec") == (official_templates()["trec"], True)
    for name, said in (("samsum", r"mine\.json: no template for samsum"), ("lcc", r"has no \{context\}")):
        with pytest.raises(DataError, match=said):
            template(name, str(mine))
    with pytest.raises(DataError, match=r"nowhere\.json: no template for qasper"):
        template("qasper", str(tmp_path / "nowhere.json"))


# Of the README's tables: the means of the categories for two models, English and Chinese, and the average it gives.
PUBLISHED = {
    "GPT-3.5-Turbo-16k": ((39.8, 38.7, 26.5, 67.1, 37.8, 54.1, 44.0), (61.2, 28.7, 16.0, 29.2, 77.5, 54.1, 44.5)),
    "ChatGLM2-6B-32k": ((32.9, 33.7, 27.6, 59.1, 39.2, 52.7, 40.9), (51.6, 37.6, 16.2, 27.7, 64.5, 52.7, 41.7)),
}


@pytest.mark.parametrize("model", PUBLISHED)
def test_the_averages_are_those_of_the_published_table(model):
    results = {}
    for language, means in zip(("english", "chinese"), PUBLISHED[model], strict=True):
        for names, mean in zip(CATEGORIES.values(), means[:-1], strict=True):
            for name in names:
                if name in CATEGORIES["code completion"] or (name in CHINESE) == (language == "chinese"):
                    results[f"longbench:{name}"] = {"metrics": {"score": mean}}
    found = overall(results)
    assert found["metrics"]["english"] == pytest.approx(PUBLISHED[model][0][-1], abs=0.051)
    assert found["metrics"]["chinese"] == pytest.approx(PUBLISHED[model][1][-1], abs=0.051)
    assert [row["tasks"] for row in found["tables"]["all"]] == [4, 4, 4, 4, 3, 2]
    assert len(results) == 21


def test_the_average_by_length_leaves_out_what_has_no_samples():
    def result(score, *buckets):
        return {"metrics": {"score": score, **dict(zip(BUCKETS, buckets, strict=True))}}

    results = {"longbench_e:qasper": result(20.0, 10.0, None, 30.0), "longbench_e:trec": result(50.0, 40.0, None, None)}
    assert overall_by_length(results)["metrics"] == {"score": 35.0, "0-4k": 25.0, "4-8k": None, "8k+": 30.0}


def question(**changes):
    base = {"_id": "q1", "difficulty": "easy", "length": "short", "question": " which? ", "context": "doc $Q$"}
    return base | {f"choice_{letter}": f"choice {letter}" for letter in "ABCD"} | {"answer": "C"} | changes


def test_longbench_v2(tmp_path):
    rows = [question(), question(_id="q2", difficulty="hard", length="long", context="d" * 5000)]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    task = LongBenchV2()
    short, long = task.samples(text(1024), TaskSettings(data=tmp_path))
    assert "(C) choice C\n" in short.prompt
    assert short.chat
    assert short.max_new_tokens == 128
    assert len(text().chat(long.prompt)) == 1024 - 128
    assert long.prompt.startswith("Text:\n\nddd")
    pairs = [(short, "The correct answer is (C)"), (long, "I do not know")]
    found = task.summarise([Scored(sample, output, task.score(sample, output)) for sample, output in pairs])
    assert found["metrics"] == {"accuracy": 50.0, "easy": 100.0, "hard": 0.0, "short": 100.0, "long": 0.0}


def test_longbench_v2_takes_another_template(tmp_path):
    (tmp_path / "data.json").write_text(json.dumps([question(context="doc")]))
    form = tmp_path / "form.txt"
    form.write_text("$DOC$|$Q$|$C_A$|$C_B$|$C_C$|$C_D$")
    settings = TaskSettings(data=tmp_path / "data.json", options={"template": str(form)})
    (sample,) = LongBenchV2().samples(text(), settings)
    assert sample.prompt == "doc|which?|choice A|choice B|choice C|choice D"
    form.write_text("$DOC$")
    with pytest.raises(DataError, match=r"has no \$Q\$"):
        next(LongBenchV2().samples(text(), settings))


def test_a_model_is_asked_and_scored(tmp_path):
    rows = [record(context="Ann met Bo. " * n, length=4000 * (n > 2)) for n in (0, 1, 40)]
    data = folder(tmp_path / "d", "trec_e", [row | {"all_classes": ["Ann"]} for row in rows])
    outcome = evaluate(subject("hybrid", 128), [LongBench("trec", extended=True)], settings(data), tmp_path / "out")
    assert not outcome.failed
    result = outcome.results["longbench_e:trec"]
    assert result["samples"] == 3
    assert result["tables"]["prompts"]["cut in the middle"] == 1
    assert result["metrics"]["8k+"] is None
