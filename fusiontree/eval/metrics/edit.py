"""How alike two lines of code are: `fuzz.ratio` of fuzzywuzzy, 0 … 100, without fuzzywuzzy.

fuzzywuzzy gives different numbers depending on what else is installed: with python-Levenshtein (or rapidfuzz) the
share of characters in a longest common subsequence, without it that of difflib's matching blocks, which is lower and
on code differs in every third pair. The first form is the one used here; the second is there for comparison with
numbers measured without python-Levenshtein.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from difflib import SequenceMatcher


def common_length(left: Sequence[Hashable], right: Sequence[Hashable]) -> int:
    """Length of a longest common subsequence.

    The row of the usual table is one integer, a bit per element of `left` that is 0 where the row steps up
    (Hyyrö 2004), so a row costs one addition.
    """
    where: dict[Hashable, int] = {}
    for index, element in enumerate(left):
        where[element] = where.get(element, 0) | 1 << index
    full = (1 << len(left)) - 1
    row = full
    for element in right:
        matched = row & where.get(element, 0)
        row = ((row + matched) | (row - matched)) & full
    return len(left) - row.bit_count()


def edit_similarity(answer: str, reference: str) -> int:
    """2·LCS / (m + n) as whole percent; 100 for equal texts, 0 when just one is empty."""
    if answer == reference:
        return 100
    total = len(answer) + len(reference)
    distance = total - 2 * common_length(answer, reference)
    return round(100 * (1.0 - distance / total))


def edit_similarity_difflib(answer: str, reference: str) -> int:
    """What fuzzywuzzy gives without python-Levenshtein: difflib's ratio as whole percent."""
    if answer == reference:
        return 100
    if not answer or not reference:
        return 0
    return round(100 * SequenceMatcher(None, answer, reference).ratio())
