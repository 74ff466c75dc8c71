"""Length curriculum: the length that rows have at each step, and how a step of always as many tokens is cut into rows.

The data is one endless stream of blocks as long as the longest rows; shorter rows are equal parts of a block. So a
place in the stream is a number of tokens whatever the length, and a change of length neither repeats nor leaves out a
token. The price: the parts of a document longer than a short row come in neighbouring rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fusiontree.errors import ConfigError

Preset = Literal["standard", "aggressive", "conservative"]
PRESETS: dict[Preset, tuple[tuple[int, float], ...]] = {  # (length, share of the run's steps)
    "standard": ((4096, 0.40), (8192, 0.25), (16384, 0.15), (32768, 0.12), (65536, 0.08)),
    "aggressive": ((4096, 0.20), (16384, 0.30), (65536, 0.50)),
    "conservative": ((4096, 0.60), (8192, 0.20), (16384, 0.10), (32768, 0.06), (65536, 0.04)),
}


@dataclass(frozen=True)
class Stage:
    """From `first_step` (from 0) on, a step is `accumulation_steps` batches of `micro_batch_size` rows of `length`, in
    every process."""

    first_step: int
    length: int
    micro_batch_size: int
    accumulation_steps: int
    needs_memory: bool
    """Whether a micro-batch holds more tokens than one of the run's own: activations are to be computed again."""


def plan_stages(
    curriculum: Preset | Sequence[Sequence[int]] | None, steps: int, sequence_length: int, micro_batch_size: int,
    accumulation_steps: int, processes: int = 1,
) -> list[Stage]:  # fmt: skip
    """Stages of a run of `steps`, each step of sequence_length × micro_batch_size × accumulation_steps tokens.

    The rows of a step are divided equally among the processes. A micro-batch gets as many rows as hold no more tokens
    than one of the run's own, and at least one row. The last length stays to the end. Raises ConfigError naming what
    does not divide.
    """
    lengths = _first_steps(curriculum, steps) if curriculum is not None else [(0, sequence_length)]
    longest, fitting = max(length for _, length in lengths), sequence_length * micro_batch_size
    tokens, stages = fitting * accumulation_steps, []
    for first, length in lengths:
        if longest % length:
            raise ConfigError(f"training.curriculum: {length} does not divide the longest length {longest}")
        rows, rest = divmod(tokens, length)
        if rest:
            raise ConfigError(
                f"training.curriculum: a step of sequence_length {sequence_length} × micro_batch_size "
                f"{micro_batch_size} × accumulation_steps {accumulation_steps} = {tokens} tokens is not a whole number "
                f"of rows of {length}"
            )
        own, rest = divmod(rows, processes)
        if rest:
            raise ConfigError(
                f"training: the {rows} rows of {length} tokens of a step (micro_batch_size {micro_batch_size} × "
                f"accumulation_steps {accumulation_steps}) cannot be divided among {processes} processes"
            )
        micro = next(size for size in range(max(fitting // length, 1), 0, -1) if own % size == 0)
        stages.append(Stage(first, length, micro, own // micro, length > fitting))
    return stages


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """The stage of the step that comes after `step` steps are done."""
    return [stage for stage in stages if stage.first_step <= step][-1]


def _first_steps(curriculum: Preset | Sequence[Sequence[int]], steps: int) -> list[tuple[int, int]]:
    """(first step, length) of each stage that has a step."""
    if isinstance(curriculum, str):
        shares = PRESETS[curriculum]
        begins = [round(steps * sum(share for _, share in shares[:index])) for index in range(len(shares) + 1)]
        found = [(begins[index], length, begins[index + 1]) for index, (length, _) in enumerate(shares)]
        return [(first, length) for first, length, end in found if end > first]
    total = sum(count for _, count in curriculum)
    if total > steps:
        raise ConfigError(f"training.curriculum: its stages take {total} steps, more than training.steps {steps}")
    firsts = [sum(count for _, count in curriculum[:index]) for index in range(len(curriculum))]
    return [(first, length) for first, (length, _) in zip(firsts, curriculum, strict=True)]
