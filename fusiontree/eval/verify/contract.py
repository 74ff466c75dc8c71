"""The lines of the contract, and a model held against them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fusiontree.errors import CheckpointError, ConfigError
from fusiontree.eval.verify import cached, numbers, packed, rows
from fusiontree.eval.verify.error import ModelFailedError, NotOfferedError
from fusiontree.eval.verify.specimen import Specimen

TOLERANCE = 1e-4  # real faults begin at a hundred times that; fp32 rounding of deep models ends well below it
BF16_TOLERANCE = 0.05  # 8 bits of mantissa, through every layer
SENSITIVE = 0.01  # less says that the text before hardly matters, and errors of every kind would stay hidden
Status = Literal["holds", "broken", "not offered"]


@dataclass(frozen=True)
class Line:
    """One promise: its name, what is compared with what, how; and a tolerance of its own, None: the general one.

    `at_least`: the difference is wanted, and the tolerance is the least that will do.
    """

    name: str
    claim: str
    measure: Callable[[Specimen], float]
    tolerance: float | None = None
    at_least: bool = False


@dataclass(frozen=True)
class Finding:
    """What a line came to. `error` is max |got - wanted| / max |wanted| over logits; None where there was no answer."""

    name: str
    claim: str
    status: Status
    error: float | None
    tolerance: float
    at_least: bool = False
    note: str = ""


LINES: tuple[Line, ...] = (
    Line("context", "another first half moves the logits of the second", packed.context, SENSITIVE, at_least=True),
    Line("causal", "later tokens never change earlier logits", packed.causal),
    Line("cached", "prefill and token by token = at once", cached.cached),
    Line("chunked", "pieces on a warm cache = at once", cached.chunked),
    Line("unnumbered", "on a warm cache without position ids = at once", cached.positions_left_out),
    Line("forked", "two copies of a cache, by turns = each at once", cached.forked),
    Line("reordered", "rows of a cache in another order = at once", cached.reordered),
    Line("rolled_back", "tokens taken back = never read", cached.rolled_back),
    Line("cache_saved", "a cache written and read = kept", cached.cache_saved),
    Line("batched", "eight rows = each alone", rows.batched),
    Line("left_padded", "padded on the left = alone", rows.left_padded),
    Line("right_padded", "padded on the right = alone", rows.right_padded),
    Line("padded_unnumbered", "padded on the left without position ids = alone", rows.padded_positions_left_out),
    Line("padded_cached", "padded prompt, then token by token = alone", rows.left_padded_cached),
    Line("padded_chunked", "padded prompt in pieces = alone", rows.left_padded_chunked),
    Line("generation", "generate on a padded batch = the most probable token, alone", rows.generation),
    Line("packed", "documents in one row, positions begin again = each alone", packed.packed_by_position),
    Line("packed_named", "documents in one row, by seq_idx = each alone", packed.packed_by_name),
    Line("saved", "saved and loaded = before", numbers.saved, 1e-6),
    Line("pruned", "branches exported away = masked", numbers.pruned),
    Line("bf16", "bf16 = fp32", numbers.rounded, BF16_TOLERANCE),
    Line("device", "GPU = CPU", numbers.moved),
)


def find_lines(*names: str) -> list[Line]:
    """The lines of these names, all of them when none is named; ConfigError for a name that is none."""
    known = {line.name: line for line in LINES}
    for name in names:
        if name not in known:
            raise ConfigError(f"--lines {name}: there is no such line; there are {', '.join(known)}")
    return [line for line in LINES if not names or line.name in names]


def verify(
    specimen: Specimen,
    lines: Sequence[Line] = LINES,
    tolerance: float = TOLERANCE,
    progress: Callable[[int, int, str], None] = lambda done, total, text: None,
) -> list[Finding]:
    """Hold a model, which must be in fp32, against lines; none of them changes it.

    CheckpointError when it cannot even read the text at once.
    """
    findings = []
    with torch.no_grad(), _exact():
        try:
            specimen.whole(specimen.ids[:1])
        except (NotOfferedError, ModelFailedError) as reason:
            raise CheckpointError(f"a plain forward pass over {specimen.length} tokens: {reason}") from reason
        for done, line in enumerate(lines):
            progress(done, len(lines), line.name)
            findings.append(examine(specimen, line, tolerance))
        progress(len(lines), len(lines), "done")
    return findings


def examine(specimen: Specimen, line: Line, tolerance: float = TOLERANCE) -> Finding:
    """One line."""
    allowed = tolerance if line.tolerance is None else line.tolerance
    try:
        error = line.measure(specimen)
    except NotOfferedError as reason:
        return Finding(line.name, line.claim, "not offered", None, allowed, line.at_least, str(reason))
    except ModelFailedError as reason:
        return Finding(line.name, line.claim, "broken", None, allowed, line.at_least, str(reason))
    good = error >= allowed if line.at_least else error <= allowed
    return Finding(line.name, line.claim, "holds" if good else "broken", error, allowed, line.at_least)


@contextlib.contextmanager
def _exact() -> Iterator[None]:
    """fp32 as fp32: a GPU would otherwise multiply in TF32, in convolutions by default."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before
