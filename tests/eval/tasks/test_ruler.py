"""The thirteen RULER-style tasks: a reader answers them all, sizes never pass the length, scores as in the original."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from fusiontree.data.shuffle import Draw
from fusiontree.errors import DataError
from fusiontree.eval.heatmap import is_grid
from fusiontree.eval.registry import find_tasks
from fusiontree.eval.task import Scored, TaskSettings
from fusiontree.eval.tasks.haystack import sentences
from fusiontree.eval.tasks.ruler import RulerTask
from fusiontree.eval.tasks.ruler.counting import CommonWordsMaker, FrequentWordsMaker, common_words
from fusiontree.eval.tasks.ruler.documents import load_corpus
from fusiontree.eval.tasks.ruler.maker import Room
from fusiontree.eval.tasks.ruler.needles import NOISE, between_lines, between_sentences
from fusiontree.eval.tasks.ruler.scoring import clean, string_match_all, string_match_part
from fusiontree.eval.tasks.ruler.summary import overall
from fusiontree.eval.tasks.ruler.task import NAMES
from tests.eval.tasks.texts import KINDS, ask, grade, ignorant, token_text

OFFLINE = NAMES[:11]
LENGTHS = (3000, 4096)


def read_needles(prompt: str) -> str:
    asked = re.search(r"\nWhat .* for (.*) mentioned in the provided text\?", prompt)[1]
    keys = asked.replace("and ", "").split(", ")
    found = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", prompt)
    return " ".join(value for key, value in found if key in keys)


def read_chain(prompt: str) -> str:
    asked = prompt.rpartition("Memorize and track")[2]
    value = re.search(r"assigned the value (\d+) in", asked)[1]
    known = [value]
    for name, given in re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", asked):
        if given in known:
            known.append(name)
    return " ".join(known[1:])


def read_list(prompt: str) -> str:
    asked = prompt.rpartition("Below is a numbered list")[2].partition("Question:")[0]
    return " ".join(word for word, _ in Counter(re.findall(r"\d+\. (\w+)", asked)).most_common(10))


def read_code(prompt: str) -> str:
    words = prompt.partition("coded words. ")[2].partition("\nQuestion:")[0].split()
    return ", ".join(word for word, _ in Counter(word for word in words if word != "...").most_common(3))


def read_documents(prompt: str) -> str:
    asked = prompt.rpartition("Question: ")[2].removesuffix(" Answer:")
    return re.search(rf"{re.escape(asked)} It is ([^.]*)\.", prompt)[1]


def reader(name: str) -> Callable[[str], str]:
    special = {"vt": read_chain, "cwe": read_list, "fwe": read_code, "qa_1": read_documents, "qa_2": read_documents}
    return special.get(name, read_needles)


@pytest.fixture
def official(tmp_path: Path) -> Path:
    """Small files in the official formats: SQuAD 2.0 and HotpotQA with distractors."""
    articles = []
    for article in range(12):
        paragraphs = []
        for part in range(3):
            query = f"What is the colour of fact {article}.{part}?"
            qas = [
                {"question": query, "is_impossible": False, "answers": [{"text": f"shade {article} {part}"}] * 3},
                {"question": "Why?", "is_impossible": True, "answers": []},
            ]
            text = f"{query} It is shade {article} {part}. " + "More is told of it here. " * 8
            paragraphs.append({"context": text, "qas": qas})
        articles.append({"paragraphs": paragraphs})
    (tmp_path / "dev-v2.0.json").write_text(json.dumps({"data": articles}))
    pages = [[f"Page {n}", [f"Who wrote book {n}? It is writer {n}.", " So it is said."]] for n in range(60)]
    items = [
        {"question": f"Who wrote book {n}?", "answer": f"writer {n}", "context": pages[n : n + 10]} for n in range(40)
    ]
    (tmp_path / "hotpot_dev_distractor_v1.json").write_text(json.dumps(items))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_answers_and_the_length_is_kept(name: str, kind: str, official: Path) -> None:
    task, text = RulerTask(name), token_text(kind, max(LENGTHS))
    samples = ask(task, text, limit=4, lengths=LENGTHS, data=official)
    assert [sample.id for sample in samples[:3]] == ["3000/0", "4096/0", "3000/1"] and len(samples) == 4
    assert grade(task, samples, reader(name)) == 100 and grade(task, samples, ignorant) == 0
    for sample in samples:
        tokens = text.count(sample.prompt) + sample.max_new_tokens
        assert tokens == sample.facts["tokens"] <= sample.facts["length"]
        assert tokens > 0.9 * sample.facts["length"], "as long as asked"
    assert len({sample.prompt for sample in samples}) == 4
    assert samples == ask(task, text, limit=4, lengths=LENGTHS, data=official), "the same seed, the same samples"
    if name != "qa_1" and name != "qa_2":
        assert samples[0].references != ask(task, text, limit=1, lengths=LENGTHS, data=official, seed=1)[0].references


def test_the_eleven_need_no_file_and_the_other_two_say_where_theirs_is(official: Path) -> None:
    assert len(OFFLINE) == 11 and [task.name for task in find_tasks("ruler")] == [f"ruler:{name}" for name in NAMES]
    text = token_text("byte", 4096)
    with pytest.raises(DataError, match=r"needs dev-v2\.0\.json, .* at https://rajpurkar"):
        ask(RulerTask("qa_1"), text, limit=1)
    with pytest.raises(DataError, match=r"needs hotpot_dev_distractor_v1\.json"):
        ask(RulerTask("qa_2"), text, limit=1, data=official / "nothing")
    (official / "squad.txt").write_text("x")
    with pytest.raises(DataError, match=r"squad\.txt: is not dev-v2\.0\.json \(JSONDecodeError"):
        ask(RulerTask("qa_1"), text, limit=1, data=official / "squad.txt")
    assert len(ask(RulerTask("qa_2"), text, limit=100, data=official)) == 40, "no more than the file has"


@pytest.mark.parametrize(
    ("name", "new_tokens", "references"),
    [
        ("niah_single_1", 128, 1), ("niah_single_2", 128, 1), ("niah_single_3", 128, 1), ("niah_multikey_1", 128, 1),
        ("niah_multikey_2", 128, 1), ("niah_multikey_3", 128, 1), ("niah_multivalue", 128, 4),
        ("niah_multiquery", 128, 4), ("vt", 30, 5), ("cwe", 120, 10), ("fwe", 50, 3),
    ],
)  # fmt: skip
def test_what_each_task_asks_for(name: str, new_tokens: int, references: int) -> None:
    (sample,) = ask(RulerTask(name), token_text("byte", 4096), limit=1)
    assert sample.max_new_tokens == new_tokens and len(set(sample.references)) == references
    uuid, number = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}", r"\d{7}"
    if name.startswith("niah"):
        wanted = uuid if name in ("niah_single_3", "niah_multikey_3") else number
        assert all(re.fullmatch(wanted, reference) for reference in sample.references)
    if name == "vt":
        assert all(re.fullmatch("[A-Z]{5}", reference) for reference in sample.references)
    if name == "fwe":
        assert all(re.fullmatch("[a-z]{6}", reference) for reference in sample.references)


def test_what_lies_around_the_needles() -> None:
    text = token_text("byte", 4096)
    for name, needles, plural in (
        ("niah_single_1", 1, False), ("niah_single_2", 1, False), ("niah_multikey_1", 4, False),
        ("niah_multivalue", 4, True), ("niah_multiquery", 4, True),
    ):  # fmt: skip
        (sample,) = ask(RulerTask(name), text, limit=1)
        assert sample.prompt.count("One of the special magic numbers for ") == needles
        assert (NOISE in sample.prompt) == (name == "niah_single_1")
        assert sample.prompt.startswith("Some special" if plural else "A special magic number is hidden within")
        assert sample.prompt.endswith("text are" if plural else "text is")
    (sample,) = ask(RulerTask("niah_multikey_3"), text, limit=1)
    lines = re.findall(r"^One of the special magic uuids for (\S+) is: (\S+)\.$", sample.prompt, re.MULTILINE)
    assert len(lines) > 20 and len({part for line in lines for part in line}) == 2 * len(lines), "nothing repeats"


def test_needles_lie_between_sentences_at_their_depth() -> None:
    told = " ".join(f"This is sentence number {n}." for n in range(200))
    for key in range(20):
        needles = [f"Needle {n}." for n in range(4)]
        context, depths = between_sentences(Draw(key), told, needles)
        parts = sentences(context)
        assert [part for part in parts if part.startswith("This")] == sentences(told)
        assert [part for part in parts if part in needles] == needles and depths == sorted(depths)
        for before, (needle, depth) in enumerate(zip(needles, depths, strict=True)):
            assert parts.index(needle) - before == int(200 * depth / 100)
    lines, depths = between_lines(Draw(0), ["hay"] * 50, ["a", "b"])
    places = [lines.split("\n").index(name) - before for before, name in enumerate("ab")]
    assert [round(100 * place / 50, 1) for place in places] == depths


def test_a_chain_has_an_example_and_hides_its_lines_in_order() -> None:
    (sample,) = ask(RulerTask("vt"), token_text("bpe", 4096), limit=1)
    example, asked = sample.prompt.split("\n\nMemorize", 1)
    assert example.startswith("Memorize and track") and re.search(r"they are:  [A-Z]{3}( [A-Z]{3}){4}$", example)
    assert token_text("bpe", 4096).count(example) < 530 and example.count(NOISE) >= 5
    chain = re.findall(r"^VAR (\w+) = (?:VAR )?(\w+) ?$", asked, re.MULTILINE)
    names = [name for name, _ in chain]
    assert tuple(names) == sample.references and [given for _, given in chain][1:] == names[:-1]
    assert re.search(rf"5 variables are assigned the value {chain[0][1]}, they are: $", asked)


@pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (8192, 30, 3)])
def test_common_words_stand_as_often_as_they_should(length: int, often: int, seldom: int) -> None:
    room = Room(token_text("bpe", length), length, TaskSettings())
    question = CommonWordsMaker(room).question(Draw(0), 50, 0)
    counts = Counter(re.findall(r"\d+\. (\w+)", question.text.rpartition("Below is")[2]))
    assert {counts[word] for word in question.references} == {often} and len(counts) == 50
    assert {count for word, count in counts.items() if word not in question.references} == {seldom}


def test_there_are_words_for_the_longest_lists() -> None:
    context, common = common_words(Draw(0), 9000, 1, 1)
    assert len(set(context.split()[1::2])) == 9000 and len(common) == 10


def test_the_frequent_words_have_one_answer() -> None:
    for size in range(27, 400):
        question = FrequentWordsMaker(4096).question(Draw(size), size, 0)
        words = question.text.partition("coded words. ")[2].partition("\nQuestion:")[0].split()
        counts = Counter(words).most_common()
        assert counts[0][0] == "..." and {word for word, _ in counts[1:4]} == set(question.references)
        assert len(counts) == 4 or counts[3][1] > counts[4][1]
    worked = FrequentWordsMaker(4096).question(Draw(0), 1000, 0)
    counts = Counter(worked.text.partition("coded words. ")[2].partition("\nQuestion:")[0].split())
    # 1000 / (k² · 1.6449) rounded down: 607, 151, 67, 37, 24 …
    assert [count for _, count in counts.most_common(5)] == [607, 151, 67, 37, 24]
    assert len(counts) == 24, "rank 24 is the last to get one"


def test_documents_hold_what_is_needed_and_distract_with_the_same_article(official: Path) -> None:
    corpus = load_corpus("qa_1", official)
    assert len(corpus.questions) == 36 and corpus.questions[0].answers == ("shade 0 0",) * 3
    assert len(corpus.questions[0].related) == 2, "the other paragraphs of the article"
    (sample,) = ask(RulerTask("qa_1"), token_text("byte", 4096), limit=1, data=official)
    for part in range(3):
        assert sample.prompt.count(f"It is shade 0 {part}.") == 1
    assert re.findall(r"^Document (\d+):$", sample.prompt, re.MULTILINE) == [
        str(n + 1) for n in range(sample.facts["size"])
    ]
    (many,) = ask(RulerTask("qa_1"), token_text("byte", 30_000), limit=1, lengths=(30_000,), data=official)
    assert many.prompt.count("It is shade 0 0.") > 1, "few documents are repeated to fill the length"


def test_matches_as_in_the_original() -> None:
    assert string_match_all("a B c", ["b", "C", "d", "e"]) == 0.5
    assert string_match_part("It was in FRANCE", ["Germany", "france", "Spain"]) == 1.0, "lm-eval gives 0.333"
    assert string_match_part("nothing", ["Germany"]) == 0.0
    assert clean(" \tone\x00two\x1f\n") == "one\ntwo"


def test_the_chat_template_stands_before_the_beginning_of_the_answer() -> None:
    text = token_text("byte", 4096)
    (plain,), (chat,) = (ask(RulerTask("cwe"), text, limit=1, options={"chat": word}) for word in ("no", "yes"))
    assert plain.prompt.endswith("above list? Answer: The top 10 words that appear most often in the list are:")
    assert chat.prompt.startswith("User: Below is") and "\n\nAssistant: Answer: The top 10 words" in chat.prompt
    assert text.count(chat.prompt) + 120 <= 4096


def test_lengths_that_cannot_be() -> None:
    text = token_text("byte", 700)
    with pytest.raises(DataError, match=r"length 700: the smallest question with its answer has \d+ tokens"):
        ask(RulerTask("vt"), text, limit=1)
    assert {s.facts["length"] for s in ask(RulerTask("fwe"), token_text("byte", 9000), limit=4)} == {4096, 8192}


def test_the_summary_and_the_effective_length() -> None:
    task = RulerTask("niah_single_1")
    samples = ask(task, token_text("byte", 6000), limit=4, lengths=LENGTHS)
    outputs = [samples[0].references[0], "", "wrong", " "]
    scored = [Scored(s, o, task.score(s, o)) for s, o in zip(samples, outputs, strict=True)]
    summary = task.summarise(scored)
    assert summary["metrics"] == {"score": 25.0}
    assert summary["tables"]["by_length"] == [
        {"length": 3000, "score": 50.0, "samples": 2, "empty": 0},
        {"length": 4096, "score": 0.0, "samples": 2, "empty": 2},
    ]


def test_over_the_tasks_there_is_a_mean_per_length_an_effective_length_and_a_grid() -> None:
    def table(*scores: float) -> dict:
        lines = [{"length": 4096 << n, "score": score, "samples": 2} for n, score in enumerate(scores)]
        return {"tables": {"by_length": lines}}

    both = overall({"ruler:vt": table(100, 90, 50, 95), "ruler:cwe": table(90, 84, 60)})
    means = {"score@4096": 95, "score@8192": 87, "score@16384": 55, "score@32768": 95}
    assert both["metrics"] == {"effective_length": 8192, **means}
    grid = both["tables"]["grid"]
    assert grid["rows"] == ["vt", "cwe"] and grid["cells"] == [[100, 90, 50, 95], [90, 84, 60, None]]
    assert grid["counts"][1] == [2, 2, 2, 0] and is_grid(grid)
    assert overall({"ruler:vt": table(85.6)})["metrics"]["effective_length"] == 0
