"""ROUGE twice, because the two packages of that name on PyPI do not agree.

`rouge_l` counts like `rouge` 1.0.1 (LongBench): sentences end at full stops, words keep case and signs, and every
word counts once. `google_rouge` counts like `rouge_score` 0.1.2 (L-Eval): lower-case letters and digits only, words
count as often as they stand.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

import numpy as np

from fusiontree.eval.metrics.chinese import segment
from fusiontree.eval.metrics.edit import common_length

TINY = 1e-8  # keeps `rouge` from dividing by zero; part of its numbers
NOT_A_WORD = re.compile(r"[^a-z0-9]+")


def rouge_l(answer: str, reference: str) -> float:
    """ROUGE-L F of `rouge` 1.0.1: the words in the union of the sentences' common subsequences, as sets.

    0 when either text is empty, where the package raises. It also raises (RecursionError) for sentences of about a
    thousand words; this one does not.
    """
    answers, references = _sentences(answer), _sentences(reference)
    if not answers or not references:
        return 0.0
    common: set[str] = set()
    for theirs in references:
        for ours in answers:
            common.update(_common_words(theirs, ours))
    recall = len(common) / len({word for sentence in references for word in sentence})
    precision = len(common) / len({word for sentence in answers for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + TINY))


def rouge_l_zh(answer: str, reference: str) -> float:
    """`rouge_l` over the words that jieba finds. ConfigError without jieba."""
    return rouge_l(" ".join(segment(answer)), " ".join(segment(reference)))


def _sentences(text: str) -> list[list[str]]:
    """Words of what stands between full stops. A sentence of blanks only is one empty word, as in the package."""
    return [" ".join(part.split()).split(" ") for part in text.split(".") if part]


def _common_words(reference: Sequence[str], answer: Sequence[str]) -> list[str]:
    """Words of that one longest common subsequence which the package finds (of several, it matters which)."""
    table = _lengths(reference, answer)
    i, j = len(reference), len(answer)
    found = []
    while i and j:
        if reference[i - 1] == answer[j - 1]:
            found.append(reference[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _lengths(left: Sequence[str], right: Sequence[str]) -> np.ndarray:
    """(len(left) + 1, len(right) + 1) lengths of the longest common subsequences of all beginnings."""
    names: dict[str, int] = {}
    rows = np.array([names.setdefault(word, len(names)) for word in left])
    columns = np.array([names.setdefault(word, len(names)) for word in right])
    table = np.zeros((len(left) + 1, len(right) + 1), dtype=np.int32)
    for i, word in enumerate(rows):
        reached = np.maximum(table[i, 1:], table[i, :-1] + (columns == word))
        np.maximum.accumulate(reached, out=table[i + 1, 1:])
    return table


def google_rouge(answer: str, reference: str) -> dict[str, float]:
    """F of ROUGE-1, ROUGE-2 and ROUGE-L of `rouge_score` 0.1.2 without stemming."""
    ours, theirs = (NOT_A_WORD.sub(" ", text.lower()).split() for text in (answer, reference))
    scores = {}
    for n in (1, 2):
        counted, wanted = _ngrams(ours, n), _ngrams(theirs, n)
        same = sum((counted & wanted).values())
        scores[f"rouge{n}"] = _f(same, sum(counted.values()), sum(wanted.values()))
    scores["rougeL"] = _f(common_length(ours, theirs), len(ours), len(theirs))
    return scores


def _ngrams(words: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))


def _f(same: int, ours: int, theirs: int) -> float:
    precision, recall = same / max(ours, 1), same / max(theirs, 1)
    return 2 * precision * recall / (precision + recall) if same else 0.0
