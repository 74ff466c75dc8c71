"""The scheduler's work, step by step and without threads: reads prompts in pieces and decodes all slots together.

A step reads at most `prefill_tokens` of prompts, then feeds one token of every slot in one model call. Long prompts are
cut at multiples of `prefill_chunk`; short ones that wait together are read in one call.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fusiontree.deploy.prefix import Gates, PrefixCache, snapshot
from fusiontree.deploy.requests import FinishReason, Limits
from fusiontree.deploy.sampling import next_tokens
from fusiontree.deploy.scheduler_streams import Job, Reading, Stream
from fusiontree.deploy.slots import Parts, SlotPool, text_parts
from fusiontree.models.cache import HybridCache
from fusiontree.models.json_files import one_line

if TYPE_CHECKING:
    from fusiontree.deploy.runtime import InferenceRuntime

_SHORT = 32  # tokens: a shorter common beginning is read again rather than kept
_log = logging.getLogger("fusiontree.serve")


class Read(NamedTuple):
    """A prompt that was read to its end."""

    job: Job
    parts: Parts
    logits: Tensor
    """(1, V)"""
    gates: Gates | None


class Engine:
    """Jobs go in through `add`; `step` moves all of them on."""

    def __init__(self, runtime: InferenceRuntime, limits: Limits) -> None:
        self.runtime = runtime
        self.limits = limits
        self.waiting: deque[Job] = deque()
        self.reading: deque[Reading] = deque()
        self.streams: list[Stream] = []  # row by row of the pool
        self.pool = SlotPool(runtime.model.config)
        self.prefixes = PrefixCache(limits.prefix_bytes)
        self.finished: Counter[FinishReason] = Counter()
        self.prompt_tokens = self.cached_tokens = self.completion_tokens = self.steps = 0

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self.waiting or self.reading or self.streams)

    @property
    def slots_used(self) -> int:
        """Slots that decode or whose prompt is being read."""
        return len(self.streams) + sum(reading.job.request.n for reading in self.reading)

    def add(self, job: Job) -> None:
        """Queue a job."""
        self.waiting.append(job)

    @torch.no_grad()
    def step(self) -> None:
        """Free what was cancelled, admit what fits, read prompts, decode one token of every slot."""
        self._end_what_must()
        self._admit()
        self._read()
        self._decode()

    def _end_what_must(self) -> None:
        """Cancelled requests and those past their deadline leave wherever they are."""
        for job in [*self.waiting, *(reading.job for reading in self.reading)]:
            if ending := job.ending():
                for stream in job.streams:
                    self._end(stream, *ending)
        self.waiting = deque(job for job in self.waiting if job.running)
        self.reading = deque(reading for reading in self.reading if reading.job.running)
        for stream in self.streams:
            if ending := stream.job.ending():
                self._end(stream, *ending)
        self._free_ended()

    def _end(self, stream: Stream, reason: FinishReason, error: str | None) -> None:
        stream.end(reason, error)
        self.finished[reason] += 1

    def _admit(self) -> None:
        while self.waiting and self.slots_used + self.waiting[0].request.n <= self.limits.slots:
            job = self.waiting.popleft()
            found = self.prefixes.longest(job.ids, job.request.gates)
            fed = 0 if found is None else len(found.tokens)
            job.start(fed)
            self.prompt_tokens += len(job.ids)
            self.cached_tokens += fed
            if found is not None and fed == len(job.ids):
                assert found.logits is not None
                self._begin_decoding([Read(job, found.parts, found.logits, found.gates)])
                continue
            config = self.runtime.model.config
            cache = HybridCache(config) if found is None else found.cache(config)
            self.reading.append(Reading(job, cache, fed, self._cuts(job, fed), self.limits.prefill_chunk))

    def _cuts(self, job: Job, fed: int) -> set[int]:
        """Where on the way the state is worth keeping: marks, where another text branches off, and the end."""
        if not self.prefixes.max_bytes:
            return set()
        wanted = {*job.request.marks, self.prefixes.branch(job.ids)}
        return {cut for cut in wanted if fed + _SHORT <= cut < len(job.ids)} | {len(job.ids)}

    def _read(self) -> None:
        budget = self.limits.prefill_tokens
        while self.reading:
            group = self._next_group(budget)
            size = len(group) * max(reading.next_end() - reading.fed for reading in group)
            if size > budget and budget < self.limits.prefill_tokens:
                return  # one piece is read in any case
            budget -= size
            try:
                done = self._feed(group)
            except (RuntimeError, MemoryError) as problem:  # torch says so when memory is short
                if len(group) > 1:
                    for reading in group:
                        reading.alone = True
                else:
                    self._drop_reading(problem)
                continue
            if done:
                self.reading = deque(reading for reading in self.reading if reading not in group)
                self._begin_decoding(done)

    def _next_group(self, budget: int) -> list[Reading]:
        """The first reading, and those right behind it when all are short prompts that fit one model call."""
        group: list[Reading] = []
        for reading in self.reading:
            longest = max(len(r.job.ids) for r in (*group, reading))
            if group and not (reading.is_short() and longest * (len(group) + 1) <= budget):
                break
            group.append(reading)
            if not reading.is_short():
                break
        return group

    def _feed(self, group: Sequence[Reading]) -> list[Read]:
        """Read the next piece of one prompt, or several whole prompts padded on the left; the prompts that are done."""
        cache = group[0].cache if len(group) == 1 else HybridCache(self.runtime.model.config)
        ends = [reading.next_end() for reading in group]
        pieces = [reading.job.ids[reading.fed : end] for reading, end in zip(group, ends, strict=True)]
        padding = [max(map(len, pieces)) - len(piece) for piece in pieces]
        device = self.runtime.device
        mask = None
        if any(padding):
            mask = torch.tensor([[0] * pad + [1] * len(piece) for pad, piece in zip(padding, pieces, strict=True)])
            mask = mask.to(device)
        out = self.runtime.model(
            input_ids=torch.tensor([[0] * pad + piece for pad, piece in zip(padding, pieces, strict=True)]).to(device),
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            output_gates=self._wants_gates(group),
        )
        gates, done = _gates(out), []
        for row, (reading, end) in enumerate(zip(group, ends, strict=True)):
            reading.fed = end
            parts = text_parts(cache, row, end)
            known = (out.logits[row, -1:], gates[row]) if end == len(reading.job.ids) else ()
            if reading.is_cut():
                self.prefixes.put(snapshot(reading.job.ids[:end], parts, *known))
            if known:
                done.append(Read(reading.job, parts, *known))
        return done

    def _wants_gates(self, group: Sequence[Reading]) -> bool:
        """They are also kept with the state, should the same prompt come again and ask for them."""
        last = any(reading.next_end() == len(reading.job.ids) for reading in group)
        return last and (self.prefixes.max_bytes > 0 or any(reading.job.request.gates for reading in group))

    def _drop_reading(self, problem: BaseException) -> None:
        job = self.reading.popleft().job
        _log.error("a prompt of %d tokens could not be read", len(job.ids), exc_info=problem)
        for stream in job.streams:
            self._end(stream, "error", f"the prompt could not be read: {one_line(problem)}")

    def _begin_decoding(self, prompts: Sequence[Read]) -> None:
        """Put the choices of prompts that were read into slots, with their first token drawn."""
        choices = [(prompt, stream) for prompt in prompts for stream in prompt.job.streams]
        self.pool.join([prompt.parts for prompt, _ in choices])
        streams = [stream for _, stream in choices]
        self.streams += streams
        self._push(streams, torch.cat([prompt.logits for prompt, _ in choices]), [p.gates for p, _ in choices])
        self._free_ended()

    def _decode(self) -> None:
        if not self.streams:
            return
        watched = any(stream.job.request.gates for stream in self.streams)
        out = self.pool.step(self.runtime.model, [stream.ids[-1] for stream in self.streams], watched)
        self.steps += 1
        self._push(self.streams, out.logits[:, -1], _gates(out))
        self._free_ended()

    def _push(self, streams: Sequence[Stream], logits: Tensor, gates: Sequence[Gates | None]) -> None:
        tokens = next_tokens(logits, [stream.draw for stream in streams])
        details = _log_probabilities(logits, tokens, [stream.job.request.logprobs for stream in streams])
        for row, (stream, token) in enumerate(zip(streams, tokens, strict=True)):
            before = stream.job.produced
            stream.push(token, *details[row], gates[row] if stream.job.request.gates else None)
            self.completion_tokens += stream.job.produced - before
            if stream.reason is not None:
                self.finished[stream.reason] += 1

    def _free_ended(self) -> None:
        """Give back the slots of streams that have ended; a state that may be continued is kept."""
        for row in range(len(self.streams) - 1, -1, -1):
            stream = self.streams[row]
            if stream.reason is None:
                continue
            self._keep(stream, row)
            self.pool.leave(row)
            last = self.streams.pop()
            if row < len(self.streams):
                self.streams[row] = last

    def _keep(self, stream: Stream, row: int) -> None:
        seen = stream.ids[: self.pool.lengths[row]]
        continued = len(seen) > len(stream.job.ids)  # the prompt's own end was kept when it was read
        if continued and self.prefixes.max_bytes and stream.reason in ("stop", "length"):
            self.prefixes.put(snapshot(seen, self.pool.row(row)))


def _gates(out: Any) -> Sequence[Gates | None]:
    """Per row the mean gate of each layer at the last token; None per row where they were not watched."""
    if out.gates is None:
        return [None] * len(out.logits)
    known = [gate[:, -1].float().mean(-1) for gate in out.gates if gate is not None]
    rows = torch.stack(known, dim=1).tolist() if known else [[] for _ in range(len(out.logits))]
    return [tuple(None if gate is None else next(means) for gate in out.gates) for means in map(iter, rows)]


def _log_probabilities(
    logits: Tensor, tokens: Sequence[int | None], wanted: Sequence[int | None]
) -> list[tuple[float | None, tuple[tuple[int, float], ...]]]:
    """Per row what the model itself gives the token, and the most probable ones, as many as wanted; None: nothing."""
    found: list[tuple[float | None, tuple[tuple[int, float], ...]]] = [(None, ()) for _ in tokens]
    rows = [row for row, count in enumerate(wanted) if count is not None and tokens[row] is not None]
    if not rows:
        return found
    known = logits[rows].float().log_softmax(-1)
    most = min(max(wanted[row] or 0 for row in rows), known.shape[1])
    best, ids = (t.tolist() for t in known.topk(most))
    chosen = known.gather(1, torch.tensor([[tokens[row]] for row in rows], device=known.device))[:, 0].tolist()
    for place, row in enumerate(rows):
        count = wanted[row] or 0
        found[row] = chosen[place], tuple(zip(ids[place][:count], best[place][:count], strict=True))
    return found
