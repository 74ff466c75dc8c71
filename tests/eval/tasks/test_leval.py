import json

import pytest

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.run import evaluate
from fusiontree.eval.task import Scored, TaskSettings, TokenText
from fusiontree.eval.tasks.leval import CLOSED, OPEN_METRICS, LEval, overall, shorter_document
from tests.eval.subjects import subject


def text(length=8192):
    return TokenText(byte_tokenizer(), length)


def folder(path, name, *records):
    path.mkdir(exist_ok=True)
    (path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return TaskSettings(data=path)


def record(instructions, outputs, evaluation="exam", document="a b c"):
    return {"instructions": instructions, "outputs": outputs, "input": document, "evaluation": evaluation}


def summary(task, settings, *outputs):
    samples = list(task.samples(text(), settings))
    assert len(samples) == len(outputs)
    return task.summarise([Scored(s, out, task.score(s, out)) for s, out in zip(samples, outputs, strict=True)])


def test_there_are_20_tasks():
    assert len(CLOSED) == 7
    assert len(OPEN_METRICS) == 13


def test_letters(tmp_path):
    settings = folder(tmp_path / "d", "coursera", record(["Q1", "Q2", "Q3"], ["AB", "C", "BCD text"]))
    found = summary(LEval("coursera"), settings, "A", "C. it is", "B) and C) and D)")
    assert found["metrics"] == {"exact": 75.0}  # 0.25, 1, 1


def test_what_an_answer_without_letters_is_worth(tmp_path):
    settings = folder(tmp_path / "d", "tpo", record(["Q1", "Q2"], ["A", "D"]))
    assert summary(LEval("tpo"), settings, "no idea", "Because D")["metrics"] == {"exact": 50.0}
    fair = TaskSettings(data=settings.data, official=False)
    assert summary(LEval("tpo"), fair, "no idea", "Because D")["metrics"] == {"exact": 50.0}
    assert summary(LEval("tpo"), fair, "no idea", "Because")["metrics"] == {"exact": 0.0}


def test_numbers_and_code(tmp_path):
    settings = folder(tmp_path / "d", "gsm100", record(["Q"], ["18"]), record(["Q"], ["7"]))
    found = summary(LEval("gsm100"), settings, "so. The answer is 18.\n\nQ: The answer is 3", "The answer is 70")
    assert found["metrics"] == {"exact": 50.0}
    settings = folder(tmp_path / "d", "codeU", record(["Q", "Q"], ["[[1.0, 2]]", "abc"]))
    found = summary(LEval("codeU"), settings, "the final output is [ [1, 2] ].", "abc it was, I think so")
    assert found["metrics"] == {"exact": 50.0}  # "abc" is not among the last four words


def test_topics_are_averaged_by_their_place(tmp_path):
    asked = ["first?", "second?", "third?"]
    settings = folder(
        tmp_path / "d",
        "topic_retrieval_longchat",
        record(asked, ["The role of art", "Space", "Tea"]),
        record(asked, ["Rain", "Snow", "Ice"]),
    )
    outputs = ("the role of ART.", "no", "tea", "rain", "snow", "no")
    found = summary(LEval("topic_retrieval_longchat"), settings, *outputs)
    assert found["metrics"] == {"exact": 66.67, "first": 100.0, "second": 50.0, "third": 50.0}


def test_science_fiction_asks_for_loyalty_with_the_story_and_for_the_fact_without(tmp_path):
    asked = "1.\tWe can fly, True or False? Answer this question based on the world described in the document."
    settings = folder(tmp_path / "d", "sci_fi", record([asked], ["True [fact: False]"], document="THE STORY"))
    task = LEval("sci_fi")
    loyalty, fact = task.samples(text(), settings)
    assert (loyalty.references, fact.references) == (("true",), ("false",))
    assert "THE STORY" in loyalty.prompt
    assert "THE STORY" not in fact.prompt
    assert "We can fly" in fact.prompt
    assert "described in the document" not in fact.prompt
    assert summary(task, settings, "True!", "It is true")["metrics"] == {"exact": 50.0, "loyalty": 100.0, "fact": 0.0}


def test_open_tasks_state_the_length_and_take_only_records_with_their_metric(tmp_path):
    settings = folder(
        tmp_path / "d",
        "financial_qa",
        record(["Why?"], ["the red apple pie"], "f1"),
        record(["Who?"], ["Ann"], "LLM"),
        record(["Who?"], ["Bo"], "human"),
    )
    task = LEval("financial_qa")
    (sample,) = task.samples(text(), settings)
    assert "Answer this question with 4 words." in sample.prompt
    assert sample.max_new_tokens == 512
    assert task.main_metric == "f1"
    assert summary(task, settings, "Red apple")["metrics"] == {"f1": 80.0}  # 2 of 2, 2 of 3


def test_rouge_is_the_geometric_mean_of_the_means(tmp_path):
    settings = folder(tmp_path / "d", "news_summ", record(["Sum up", "Sum up"], ["a b c d", "x y"], "rouge"))
    found = summary(LEval("news_summ"), settings, "a b d", "x y")["metrics"]
    # First: 1-grams 3 of 3 and 4 (6/7), 2-grams 1 of 2 and 3 (2/5), longest 3 (6/7); second all 1.
    one, two = 100 * (6 / 7 + 1) / 2, 100 * (2 / 5 + 1) / 2
    assert found == {
        "rouge1": round(one, 2),
        "rouge2": round(two, 2),
        "rougeL": round(one, 2),
        "rouge": round((one * two * one) ** (1 / 3), 2),
    }


def test_a_document_loses_its_last_words_250_at_a_time():
    # A word is "wwww " of 5 tokens. 1,400 allowed tokens: 1,400 words, then 1,150 … until 150 words have 749.
    document = " ".join(["wwww"] * 1500)
    kept = shorter_document(text(), document, 1400)
    assert kept == " ".join(["wwww"] * 150)
    assert shorter_document(text(), document, len(document)) == document
    numbered = " ".join(f"{i:04d}" for i in range(1500))
    assert shorter_document(text(), numbered, 1400).startswith("0000 ")
    assert shorter_document(text(), numbered, 1400, from_left=True).endswith(" 1499")
    assert len(shorter_document(text(), numbered, 1400, from_left=True).split()) == 150
    with pytest.raises(DataError, match="does not fit into 100 tokens"):
        shorter_document(text(), "w" * 101, 100)


def test_a_prompt_keeps_question_and_frame_when_the_document_is_cut(tmp_path):
    document = " ".join(["wwww"] * 1500)
    settings = folder(tmp_path / "d", "quality", record(["Which {document} one?"], ["A"], document=document))
    (sample,) = LEval("quality").samples(text(4096), settings)
    assert len(text().chat(sample.prompt)) <= 4096 - 512
    assert "Which {document} one?" in sample.prompt
    assert sample.prompt.endswith("Answer:")
    (sample,) = LEval("quality").samples(
        text(4096), TaskSettings(data=settings.data, options={"answer_tokens": "8"}, limit=1)
    )
    assert sample.max_new_tokens == 8
    with pytest.raises(ConfigError, match="answer_tokens=0"):
        next(LEval("quality").samples(text(), TaskSettings(data=settings.data, options={"answer_tokens": "0"})))


def test_nothing_to_score_and_no_data_are_errors(tmp_path):
    with pytest.raises(DataError, match="leval:tpo: nothing was scored"):
        LEval("tpo").summarise([])
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no file tpo\.jsonl.*github\.com/OpenLMLab/LEval"):
        next(LEval("tpo").samples(text(), TaskSettings(data=tmp_path / "empty")))


def test_a_model_is_asked_and_scored(tmp_path):
    data = folder(tmp_path / "d", "tpo", record(["Q1", "Q2"], ["A", "B"], document="w " * 2000)).data
    settings = TaskSettings(data=data, options={"answer_tokens": "4"})
    outcome = evaluate(subject("llama", 1024), [LEval("tpo")], settings, tmp_path / "out")
    assert not outcome.failed
    assert outcome.results["leval:tpo"]["samples"] == 2


def test_closed_f1_and_rouge_tasks_are_averaged_apart():
    scores = {
        "tpo": ("exact", 80.0),
        "quality": ("exact", 61.39),
        "narrative_qa": ("f1", 12.0),
        "news_summ": ("rouge", 9),
    }
    results = {
        f"leval:{name}": {"main_metric": kind, "metrics": {kind: score}} for name, (kind, score) in scores.items()
    }
    assert overall(results)["metrics"] == {"exact": 70.69, "f1": 12.0, "rouge": 9}
