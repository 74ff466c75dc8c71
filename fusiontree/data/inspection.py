"""What is in a source: documents, tokens, lengths, duplicates, bad records."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import PreTrainedTokenizerFast

from fusiontree.data.config import SourceConfig
from fusiontree.data.progress import byte_progress
from fusiontree.data.records import BadRecords
from fusiontree.data.shuffle import Numbers
from fusiontree.data.sources import expand, read_source
from fusiontree.data.store import TokenStore
from fusiontree.data.tokenizer import tokenise

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Inspection:
    """Lengths are in `unit`: tokens (the end included) where there is a tokenizer, else characters."""

    unit: str
    lengths: Numbers
    duplicates: int
    """Documents whose text is that of an earlier one."""
    bad_records: BadRecords

    def histogram(self) -> list[tuple[int, int]]:
        """(power of two, documents shorter than it and not shorter than half of it), from the first that has any."""
        powers = np.frexp(self.lengths.astype(float))[1]
        counts = np.bincount(powers)
        return [(2**power, int(counts[power])) for power in range(int(powers.min()), len(counts))]

    def lines(self) -> Iterator[str]:
        """The report, line by line."""
        count, bad = len(self.lengths), self.bad_records
        yield f"documents   {count:,}"
        yield f"{self.unit:<11} {int(self.lengths.sum()):,}"
        yield f"duplicates  {self.duplicates:,} ({self.duplicates / count:.1%})"
        yield f"too short   {bad.short:,}"
        yield f"bad records {bad.count:,}"
        yield from (f"  {example}" for example in bad.examples[:10])
        quantiles = np.quantile(self.lengths, QUANTILES, method="inverted_cdf")
        named = ", ".join(f"{share:.0%} {int(value):,}" for share, value in zip(QUANTILES, quantiles, strict=True))
        yield f"{self.unit} per document: mean {self.lengths.mean():,.0f}, {named}, longest {int(self.lengths.max()):,}"
        histogram = self.histogram()
        widest = max(number for _, number in histogram)
        yield from (f"  < {edge:>12,} {number:>12,} {'█' * -(-40 * number // widest)}" for edge, number in histogram)


def inspect_source(source: SourceConfig, tokenizer: PreTrainedTokenizerFast | None = None) -> Inspection:
    """Read a source of files whole, or a prepared folder. Raises DataError when nothing in it is usable."""
    if source.mode == "static":
        store = TokenStore(Path(source.path).expanduser())
        hashes = np.asarray(store.hashes)
        return Inspection("tokens", np.diff(store.offsets), _repeated(hashes), store.bad_records)
    bad, lengths, marks = BadRecords(), array("q"), array("Q")
    tolerant = source.model_copy(update={"max_bad_fraction": 1.0})
    total = sum(path.stat().st_size for path in expand(source))
    with byte_progress("reading", total) as advance:
        documents = read_source(tolerant, bad, advance)
        measured = (
            tokenise(documents, tokenizer) if tokenizer else ((document, document.text) for document in documents)
        )
        for document, content in measured:
            lengths.append(len(content))
            mark = hashlib.blake2b(document.text.encode(), digest_size=8).digest()
            marks.append(int.from_bytes(mark, "little"))
    unit = "tokens" if tokenizer else "characters"
    return Inspection(unit, np.array(lengths, dtype=np.int64), _repeated(np.frombuffer(marks, dtype=np.uint64)), bad)


def _repeated(marks: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> int:
    return len(marks) - len(np.unique(marks))
