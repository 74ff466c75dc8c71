"""Answers that are one of a few things: a class, a number, a paragraph, a letter."""

from __future__ import annotations

import re
from collections.abc import Sequence

from fusiontree.errors import DataError

NUMBER = re.compile(r"\d+")


def classification(answer: str, reference: str, classes: Sequence[str], official: bool = True) -> float:
    """1/k when the gold class is among the k class names in the answer, else 0.

    Names that are part of the gold name ("date" in "date of birth") do not count. The official loop takes them out
    of the list it is going through, so that the name after each is never looked at; `official=False` looks at all.
    """
    found = [name for name in classes if name in answer]
    if official:
        index = 0
        while index < len(found):
            if _part_of(found[index], reference):
                found.remove(found[index])  # the first of that name, and the index moves on all the same
            index += 1
    else:
        found = [name for name in found if not _part_of(name, reference)]
    return 1.0 / len(found) if reference in found else 0.0


def _part_of(name: str, reference: str) -> bool:
    return name != reference and name in reference


def share_of_numbers(answer: str, number: str) -> float:
    """Share of the whole numbers in the answer that are written like this one; 0 when there is none."""
    numbers = NUMBER.findall(answer)
    return numbers.count(number) / len(numbers) if numbers else 0.0


def retrieval(answer: str, reference: str, word: str) -> float:
    """`share_of_numbers` for the number that follows `word` ("Paragraph ", "段落") in the reference."""
    gold = re.search(re.escape(word) + r"(\d+)", reference)
    if gold is None:
        raise DataError(f'the gold answer "{reference}" names no "{word}NUMBER"; it is not the official file')
    return share_of_numbers(answer, gold.group(1))


def stated_letter(answer: str) -> str | None:
    """The letter in "The correct answer is (C)" (LongBench v2), stars and brackets or not; None when there is none."""
    plain = answer.replace("*", "")
    for pattern in (r"The correct answer is \(([A-D])\)", r"The correct answer is ([A-D])"):
        found = re.search(pattern, plain)
        if found:
            return found.group(1)
    return None
