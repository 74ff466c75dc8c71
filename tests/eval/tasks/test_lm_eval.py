"""The harness's own adapter (HFLM), ours, and sums computed here by hand give the same numbers."""

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance
from tokenizers import processors

from fusiontree.data.tokenizer import byte_tokenizer
from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.registry import find_tasks
from fusiontree.eval.run import evaluate
from fusiontree.eval.subject import Subject
from fusiontree.eval.task import TaskSettings
from fusiontree.eval.tasks.lm_eval import Answers, HarnessTask, manner
from tests.eval.subjects import hybrid, llama, subject
from tests.eval.tasks.harness import hflm
from tests.eval.test_subject import PAIRS, PROMPTS, own_loglikelihood

TASKS = Path(__file__).parent / "harness_tasks"
KINDS = ["hybrid", "hybrid with BOS", "llama", "llama with BOS"]
WINDOW = 40
ASKED = [pair for pair in PAIRS if pair[0].strip() or not pair[0]]  # HFLM fails on a context of blanks alone
TEXTS = ["a", "x" * WINDOW, "y" * (WINDOW + 1), "the state is read and a window moves, naïve 树 or not. " * 3]


class Forgetful:
    def __call__(self, done, total):
        assert 0 < done <= total

    def once(self, key, measure):
        return measure()


def requests(kind, arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def bos_tokenizer():
    tokenizer = byte_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)]
    )
    return tokenizer


@pytest.fixture(scope="module", params=KINDS)
def trio(request):
    """Our answers in batches of 8 and of 1, and the harness's own model class, on one model."""
    model = hybrid() if request.param.startswith("hybrid") else llama()
    tokenizer = bos_tokenizer() if "BOS" in request.param else byte_tokenizer()
    ours = [Answers(Subject(model, tokenizer, max_length=WINDOW, batch_size=size), Forgetful()) for size in (8, 1)]
    return *ours, hflm()(pretrained=model, tokenizer=tokenizer, batch_size=4, max_length=WINDOW)


def test_loglikelihood(trio):
    asked = requests("loglikelihood", [*ASKED, ("c" * 60, "d" * 9)])  # the last is cut from the left
    eight, one, theirs = (each.loglikelihood(asked) for each in trio)
    for found in (one, theirs):
        assert [score for score, _ in eight] == pytest.approx([score for score, _ in found], abs=1e-4)
        assert [greedy for _, greedy in eight] == [greedy for _, greedy in found]
    assert trio[0].cut == 2  # "x" * 90 is the other


def test_rolling(trio):
    asked = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    eight, one, theirs = (each.loglikelihood_rolling(asked) for each in trio)
    assert eight == pytest.approx(one, abs=1e-4) and eight == pytest.approx(theirs, abs=1e-4)


def test_generation(trio):
    wishes = (
        {"until": ["e"], "max_gen_toks": 12},
        {"until": "\n", "max_gen_toks": 5},
        {"max_gen_toks": 7, "until": []},
    )
    prompts = [prompt for prompt in PROMPTS if prompt]  # HFLM cannot begin with nothing
    asked = requests("generate_until", [(prompt, dict(wish)) for prompt in prompts for wish in wishes])
    eight, one, theirs = (each.generate_until(asked) for each in trio)
    assert eight == one == theirs and len(set(eight)) > 10


def test_our_loglikelihood_is_the_plain_sum():
    asked = Answers(subject("hybrid", batch_size=3), Forgetful())
    for (context, rest), (score, greedy) in zip(PAIRS, asked.loglikelihood(requests("l", PAIRS)), strict=True):
        head, tail = asked.subject.encode_pair(context, rest)
        plain = own_loglikelihood(asked.subject.model, head + tail, len(head))
        assert (score, greedy) == (pytest.approx(plain[0], abs=1e-4), plain[1])


@pytest.fixture
def quick(monkeypatch):
    """The runner asks the operating system about the machine, which takes seconds."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def settings(**more):
    return TaskSettings(data=TASKS, **more)


def test_tasks_run_through_the_harness_and_give_its_numbers(quick, tmp_path):
    asked, names = subject("hybrid", batch_size=4), ("lm_eval:made_up_choice", "lm_eval:made_up_pages")
    outcome = evaluate(asked, find_tasks(*names, "lm_eval:made_up_answer"), settings(), tmp_path / "out")
    assert not outcome.failed
    choice, pages, answer = (outcome.results[name] for name in (*names, "lm_eval:made_up_answer"))
    rows = [
        json.loads(line) for line in (tmp_path / "out/samples/lm_eval-made_up_choice.jsonl").read_text().splitlines()
    ]
    right = 0
    for row in rows[1:]:
        doc = row["doc"]
        context = f"Question: {doc['question']}\nAnswer:"
        scores = [asked.loglikelihood([(context, f" {choice}")])[0][0] for choice in doc["choices"]]
        right += scores.index(max(scores)) == doc["answer"]
    assert choice["metrics"]["acc"] == right / 10 and choice["samples"] == 10 and choice["main_metric"] == "acc"
    assert choice["tables"]["tasks"]["made_up_choice"]["version"] == 2.5 and "acc" in choice["errors"]
    texts = [f"{word}. " + "the state is read and a window moves; " * i
             for i, word in enumerate(("state", "window", "gate", "branch", "layer"))]  # fmt: skip
    nats = -sum(asked.rolling(texts))
    size = sum(len(text.encode()) for text in texts)
    assert pages["metrics"]["bits_per_byte"] == pytest.approx(nats / size / math.log(2), rel=1e-5)
    words = sum(len(re.split(r"\s+", text)) for text in texts)  # as the harness counts: one more for a blank at the end
    assert pages["metrics"]["word_perplexity"] == pytest.approx(math.exp(nats / words), rel=1e-4)
    assert answer["metrics"].keys() == {"exact_match"} and answer["samples"] == 10


def test_a_group_names_its_members_and_a_killed_one_goes_on(quick, tmp_path):
    task = HarnessTask("made_up_group")
    result = evaluate(subject("llama"), [task], settings(limit=3), tmp_path / "o").results[task.name]
    assert result["metrics"].keys() >= {"acc", "made_up_choice/acc", "made_up_answer/exact_match"}
    assert result["samples"] == 6 and result["main_metric"] == "acc"
    parts = tmp_path / "o" / "parts" / "lm_eval-made_up_group.jsonl"
    lines = parts.read_text().splitlines(keepends=True)
    parts.write_text("".join(lines[:-1]))
    again = evaluate(subject("llama"), [task], settings(limit=3), tmp_path / "o").results[task.name]
    assert again["metrics"] == result["metrics"] and parts.read_text() == "".join(lines)


def test_what_the_harness_does_not_have(monkeypatch):
    monkeypatch.setattr(
        "fusiontree.eval.tasks.lm_eval._manager", lambda folder, own: SimpleNamespace(all_tasks=["arc_easy"])
    )
    with pytest.raises(ConfigError, match="no such task; near: arc_easy"):
        HarnessTask("arc_eazy").measure(subject(), TaskSettings(), Forgetful())
    with pytest.raises(DataError, match="a folder with task YAML files"):
        HarnessTask("x").measure(subject(), TaskSettings(data=Path("nowhere")), Forgetful())
    for key, value in (("num_fewshot", "few"), ("chat_template", "perhaps")):
        with pytest.raises(ConfigError, match=f"{key}={value}"):
            HarnessTask("made_up_choice").measure(subject(), settings(options={key: value}), Forgetful())


def test_data_that_cannot_be_had_is_one_line(tmp_path):
    (tmp_path / "t.yaml").write_text(
        "task: unreachable\ndataset_path: nobody/nothing-at-all\noutput_type: generate_until\ntest_split: test\n"
        "doc_to_text: a\ndoc_to_target: b\n"
    )
    with pytest.raises(DataError, match="lm_eval:unreachable: the task or its data cannot be had") as caught:
        HarnessTask("unreachable").measure(subject(), TaskSettings(data=tmp_path), Forgetful())
    assert "\n" not in str(caught.value)


def test_an_empty_set_is_refused():
    with pytest.raises(DataError, match="made_up_nothing: there is not one question"):
        HarnessTask("made_up_nothing").measure(subject(), settings(), Forgetful())


def test_without_the_harness_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(ConfigError, match=r"pip install 'fusiontree\[eval\]'"):
        HarnessTask("arc_easy").measure(subject(), TaskSettings(), Forgetful())


def test_only_greedy_generation():
    assert manner({}) == (256, ())
    assert manner({"until": "a", "max_new_tokens": 3, "do_sample": False, "temperature": 0.0}) == (3, ("a",))
    for wish in ({"do_sample": True}, {"temperature": 0.7}, {"num_beams": 4}):
        with pytest.raises(ConfigError, match="only greedy"):
            manner(wish)


def test_what_does_not_fit_even_cut_is_refused():
    asked = Answers(subject("llama", max_length=16), Forgetful())
    with pytest.raises(DataError, match="continuation of 17 tokens"):
        asked.loglikelihood(requests("l", [("a", "b" * 17)]))
    with pytest.raises(DataError, match="leave no room"):
        asked.generate_until(requests("g", [("a", {"max_gen_toks": 16})]))


def test_the_chat_template_is_the_tokenizers(quick, tmp_path):
    asked = subject("llama")
    task = HarnessTask("made_up_answer")
    evaluate(asked, [task], settings(limit=2, options={"chat_template": "yes"}), tmp_path / "o")
    row = json.loads((tmp_path / "o/samples/lm_eval-made_up_answer.jsonl").read_text().splitlines()[1])
    assert row["arguments"][0][0] == "User: state number 0:\n\nAssistant:"
