"""L-Eval's closed questions: what of an answer counts, and when it is right."""

from __future__ import annotations

import re

from fusiontree.eval.metrics.words import without_articles

LETTERS = "ABCD"
BLANKS = re.compile(r"\s+")
LISTED = re.compile(r"[A-D](?=[\s.)])")  # a letter as it heads an option
CODE_SIGNS = (",", "'", "\\", ".0"), (("] [", "]["), ("[ [", "[["), ("] ]", "]]"))
CODE_FILLERS = ("will be", "of the code", "is", "would be", "the value of", "the result of", "printed")
LEAD = "The answer is"


def exact(answer: str, reference: str) -> float:
    """1 when right, 0.25 for letters that are some of several right ones, else 0.

    Letters are compared as they stand; numbers as numbers; anything else is right when the answer holds the gold
    text, case and blanks aside.
    """
    gold = without_articles(reference)
    if all(sign in LETTERS for sign in gold):
        given = without_articles(answer)
        return 1.0 if given == gold else 0.25 if set(given) <= set(gold) else 0.0
    try:
        return float(float(answer) == float(reference))
    except ValueError:
        return float(_bare(reference) in _bare(answer))


def _bare(text: str) -> str:
    return text.lower().replace(" ", "")


def gold_letters(reference: str) -> str:
    """The letters A–D in the first word of a gold answer; "A" when there is none."""
    return "".join(sign for sign in reference.split()[0] if sign in LETTERS) or "A"


def chosen_letter(answer: str, official: bool = True) -> str:
    """The option that an answer to a question with one right option names.

    Official: the first of A, B, C, D in it, be it that of "Because"; without any, "A", a guess. Otherwise a letter
    that stands alone, and "None" without one.
    """
    if not answer.strip():
        return "None"
    if not official:
        found = re.search(r"(?<![A-Za-z])[A-D](?![A-Za-z])", answer)
        return found.group() if found else "None"
    if answer in LETTERS:
        return answer
    return next((sign for sign in answer if sign in LETTERS), "A")


def chosen_letters(answer: str, official: bool = True) -> str:
    """The options that an answer to a question with several right options names, in order: "ABD".

    Official: the letters it begins with, if several; else those and all that stand before a blank, full stop or
    bracket; else the first run of letters anywhere; else "A". Otherwise letters that stand alone or in a group.
    """
    if not answer.strip():
        return "None"
    if not official:
        groups = re.findall(r"(?<![A-Za-z])[A-D]+(?![A-Za-z])", answer)
        return _sorted("".join(groups)) or "None"
    if answer in LETTERS:
        return answer
    start = len(answer) - len(answer.lstrip(LETTERS))
    if start > 1:
        return _sorted(answer[:start])
    rest = answer[start:].split("Question")[0]
    listed = answer[:start] + "".join(LISTED.findall(rest))
    run = re.search(f"[{LETTERS}]+", rest)
    return _sorted(listed) or (run.group() if run else "A")


def _sorted(letters: str) -> str:
    return "".join(sorted({sign for sign in letters if sign in LETTERS}))


def stated_number(answer: str) -> str:
    """The digits, up to a full stop, of the word after "The answer is"; else of the last word that has a digit."""
    stated = re.search(LEAD + r" (\S+)", answer)
    if stated:
        word = stated.group(1)
    else:
        words = reversed(answer.split("\n\n")[0].split(" "))
        word = next((word for word in words if any(sign.isdigit() for sign in word)), "")
    return "".join(sign for sign in word.split(".")[0] if sign.isdigit())


def plain_code(text: str) -> str:
    """The printed value of a program without the signs in which writings of it differ."""
    text = BLANKS.sub(" ", text)
    signs, brackets = CODE_SIGNS
    for sign in signs:
        text = text.replace(sign, "")
    for wide, tight in brackets:
        text = text.replace(wide, tight)
    return text


def stated_output(answer: str, reference: str) -> str:
    """The words of an answer among which the printed value must be: three more than the gold answer has.

    They are the last ones, or the first ones after the last "the final output".
    """
    count = len(reference.split()) + 3
    text = plain_code(answer)
    for filler in CODE_FILLERS:
        text = text.replace(filler, "")
    if "the final output" in text:
        return " ".join(BLANKS.split(text.split("the final output")[-1])[:count])
    return " ".join(BLANKS.split(text)[-count:])


def truth(answer: str) -> str:
    """ "true" or "false", whichever is in the first word that holds either; "<error>" when none does."""
    for word in answer.lower().split():
        for value in ("true", "false"):
            if value in word:
                return value
    return "<error>"
