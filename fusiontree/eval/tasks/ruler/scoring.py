"""RULER's two scores: which references stand in the answer, upper and lower case alike."""

from __future__ import annotations

import re
from collections.abc import Sequence

CONTROL = re.compile(r"[\x00-\x1f]")


def clean(output: str) -> str:
    """The answer without white space around it, control characters turned into line ends."""
    return CONTROL.sub("\n", output.strip()).strip()


def string_match_all(output: str, references: Sequence[str]) -> float:
    """Share of the references that the answer contains."""
    return sum(reference.lower() in output.lower() for reference in references) / len(references)


def string_match_part(output: str, references: Sequence[str]) -> float:
    """1 when the answer contains any of the references, else 0.

    lm-evaluation-harness 0.4.13 gives the share of the references instead: 0.33 for one of three.
    """
    return float(any(reference.lower() in output.lower() for reference in references))
