"""Our metrics against numbers that the official code gave: official_scores.json, made-up answers and their scores.

The numbers come from LongBench (commit 2e00731, with fuzzywuzzy 0.18.0 and python-Levenshtein 0.27.5, rouge 1.0.1,
jieba 0.42.1), rouge_score 0.1.2, L-Eval (cd34b05) and RepoBench (630c865). Equal means equal to the last bit.
"""

import json
import re
from pathlib import Path

import pytest

from fusiontree.eval.metrics import leval
from fusiontree.eval.metrics.choices import classification, retrieval, share_of_numbers, stated_letter
from fusiontree.eval.metrics.code import longbench_line, repobench_line
from fusiontree.eval.metrics.edit import edit_similarity
from fusiontree.eval.metrics.rouge import google_rouge, rouge_l, rouge_l_zh
from fusiontree.eval.metrics.words import qa_f1, qa_f1_zh
from fusiontree.eval.task import TokenText
from fusiontree.eval.tasks.repobench import build_prompt

OFFICIAL = json.loads(Path(__file__).with_name("official_scores.json").read_text(encoding="utf-8"))


class Words(TokenText):
    """Words, signs and blanks as tokens, with or without a BOS."""

    def __init__(self, bos: bool) -> None:
        self.bos = bos
        self.max_length = 10**9

    def count(self, text):
        return self.bos + len(re.findall(r"\w+|[^\w\s]|\s+", text))


def truths(answer):
    loyalty, fact = answer.lower().split("[fact:")
    return [leval.truth(loyalty), leval.truth(fact[:-1])]


OURS = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge_l": rouge_l,
    "rouge_l_zh": rouge_l_zh,
    "google_rouge": google_rouge,
    "edit": edit_similarity,
    "code": lambda answer, gold: edit_similarity(longbench_line(answer), gold) / 100,
    "count": share_of_numbers,
    "retrieval": lambda answer, gold: retrieval(answer, gold, "Paragraph "),
    "retrieval_zh": lambda answer, gold: retrieval(answer, gold, "段落"),
    "classification": classification,
    "chosen_letter": leval.chosen_letter,
    "chosen_letters": leval.chosen_letters,
    "gold_letters": leval.gold_letters,
    "exact": leval.exact,
    "stated_number": leval.stated_number,
    "stated_output": leval.stated_output,
    "truths": truths,
    "repobench_line": repobench_line,
    "repobench_line_java": lambda output: repobench_line(output, "java"),
    "stated_letter": stated_letter,
    "repobench_prompt": lambda record, language, bos, limit: build_prompt(record, language, Words(bos), limit),
}


def test_every_official_number_is_compared():
    assert set(OURS) == set(OFFICIAL)


@pytest.mark.parametrize("name", OURS)
def test_equals_the_official_code(name):
    cases = OFFICIAL[name]
    different = [case for case in cases if OURS[name](*case[:-1]) != case[-1]]
    assert not different
    assert len({json.dumps(case[-1]) for case in cases}) > 1  # not all the same
