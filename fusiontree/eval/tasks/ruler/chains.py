"""Variable tracking: a value handed from variable to variable, hidden line by line in noise; which have it?

… VAR ABCDE = 12345 … VAR FGHIJ = VAR ABCDE … Find all variables that are assigned the value 12345 …
"""

from __future__ import annotations

import math
import string
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from fusiontree.data.shuffle import Draw
from fusiontree.eval.tasks.ruler.maker import Question, Room, wording
from fusiontree.eval.tasks.ruler.needles import NOISE
from fusiontree.eval.tasks.sizes import largest

HOPS = 4
EXAMPLE_TOKENS = 500


@dataclass(frozen=True)
class ChainMaker:
    """A worked example with names of three letters, then the question with names of five; sizes in lines of noise."""

    room: Room
    smallest: int = HOPS + 1
    most: float = math.inf

    def question(self, draw: Draw, size: int, index: int) -> Question:
        """Facts: the depth of the five lines in percent."""
        example, asked = chain(draw, self._example_size, 3), chain(draw, size, 5)
        shown = f"{example.prompt} {' '.join(example.references)}"
        return Question(f"{shown}\n\n{asked.text}", asked.lead, asked.references, asked.facts)

    @cached_property
    def _example_size(self) -> int:
        """The most lines with which the example has at most 500 tokens; the least there can be in a pinch."""
        count = self.room.text.count
        most = largest(lambda lines: count(chain(Draw(0), lines, 3).prompt) <= EXAMPLE_TOKENS, self.smallest)
        return self.smallest if most is None else most


def chain(draw: Draw, lines: int, letters: int) -> Question:
    """A question about one chain between `lines` lines of noise."""
    names: dict[str, None] = {}
    while len(names) <= HOPS:
        names["".join(draw.choose(string.ascii_uppercase) for _ in range(letters))] = None
    variables, value = list(names), str(10000 + draw.below(89999))
    hidden = [f"VAR {variables[0]} = {value}"]
    hidden += [f"VAR {new} = VAR {old} " for old, new in pairwise(variables)]
    places = sorted(draw.sample(range(lines), len(hidden)))
    parts = [NOISE] * lines
    for place, line in zip(reversed(places), reversed(hidden), strict=True):
        parts.insert(place, line)
    text, lead = wording("vt").fill("\n".join(parts), query=value, num_v=HOPS + 1)
    return Question(text, lead, tuple(variables), {"depths": [round(100 * place / lines, 1) for place in places]})
