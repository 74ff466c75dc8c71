"""Continuous batching: a thread that decodes all requests together, token by token, as they come and go."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from typing import TYPE_CHECKING

from fusiontree.deploy.requests import EngineClosed, Limits, QueueFull, Request, Stats
from fusiontree.deploy.scheduler_engine import Engine
from fusiontree.deploy.scheduler_streams import Job
from fusiontree.deploy.scheduler_ticket import Ticket
from fusiontree.models.json_files import one_line

if TYPE_CHECKING:
    from fusiontree.deploy.runtime import InferenceRuntime

_RATE_SECONDS = 5.0  # over which tokens per second are counted
_log = logging.getLogger("fusiontree.serve")


class Scheduler:
    """The `ServingEngine` of one model. Every method may be called from any thread; `close` it, or use `with`."""

    def __init__(self, runtime: InferenceRuntime, limits: Limits | None = None) -> None:
        self.runtime = runtime
        self.limits = limits or Limits()
        self._engine = Engine(runtime, self.limits)
        self._changed = threading.Condition()
        self._arrived: deque[Job] = deque()
        self._running: list[Job] = []  # taken and not ended
        self._draining = self._closing = False
        self._failure: BaseException | None = None
        self._submitted = 0
        self._seconds_per_job = 1.0
        self._rates: deque[tuple[float, int]] = deque()  # (when, tokens until then)
        self._thread = threading.Thread(target=self._run, name="fusiontree-scheduler", daemon=True)
        self._thread.start()

    def __enter__(self) -> Scheduler:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def failure(self) -> BaseException | None:
        """Why it stopped working by itself; None while it is well."""
        return self._failure

    def submit(self, request: Request) -> Ticket:
        """Queue a request and return at once. ConfigError: it does not fit the model; QueueFull; EngineClosed."""
        ids = self.runtime.request_ids(request, self.limits.slots)
        job = Job(Ticket(request, len(ids), self._wake), ids, self.runtime)
        with self._changed:
            if self._failure is not None:
                raise EngineClosed(f"the model has stopped working: {one_line(self._failure)}")
            if self._draining or self._closing:
                raise EngineClosed("the server is shutting down")
            over = sum(other.running for other in self._running) + request.n - self.limits.slots
            if over > self.limits.queue:
                wait = max(1.0, self._seconds_per_job * over / self.limits.slots)
                raise QueueFull(f"all {self.limits.slots} slots are busy and {over - request.n} answers wait", wait)
            self._running.append(job)
            self._arrived.append(job)
            self._submitted += 1
            self._changed.notify_all()
        return job.ticket

    def stats(self) -> Stats:
        """The engine now, for metrics."""
        engine = self._engine
        with self._changed:
            return Stats(
                slots=self.limits.slots,
                active=len(engine.streams),
                prefilling=engine.slots_used - len(engine.streams),
                waiting=len(self._arrived) + len(engine.waiting),
                submitted=self._submitted,
                finished=dict(engine.finished),
                prompt_tokens=engine.prompt_tokens,
                cached_tokens=engine.cached_tokens,
                completion_tokens=engine.completion_tokens,
                steps=engine.steps,
                tokens_per_second=self._rate(),
                state_bytes=engine.pool.state_bytes(),
                prefix_bytes=engine.prefixes.nbytes,
                prefix_entries=len(engine.prefixes),
                prefix_hits=engine.prefixes.hits,
            )

    def drain(self, timeout: float | None = None) -> bool:
        """Take no more requests and wait until those taken are done; False when `timeout` seconds did not suffice."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._running, timeout)

    def close(self) -> None:
        """Cancel what still runs and stop; may be called twice."""
        with self._changed:
            self._closing = True
            for job in self._running:
                job.ticket.cancelled = True
            self._changed.notify_all()
        self._thread.join()

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _run(self) -> None:
        while self._take():
            try:
                self._engine.step()
            except BaseException as problem:  # whatever it is, nobody may wait for ever
                _log.exception("decoding failed; the engine stops")
                self._give_up(problem)
                return
            self._note_progress()

    def _take(self) -> bool:
        """Wait for something to do and take what arrived; False at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._engine.busy or self._closing)
            while self._arrived:
                self._engine.add(self._arrived.popleft())
            return self._engine.busy or not self._closing

    def _give_up(self, problem: BaseException) -> None:
        with self._changed:
            self._failure = problem
            for job in self._running:
                for stream in job.streams:
                    if stream.reason is None:
                        stream.end("error", f"the model has stopped working: {one_line(problem)}")
            self._running.clear()
            self._engine = Engine(self.runtime, self.limits)  # its state is not to be trusted any more
            self._changed.notify_all()

    def _note_progress(self) -> None:
        now = time.monotonic()
        with self._changed:
            ended = [job for job in self._running if not job.running]
            for job in ended:
                self._seconds_per_job += 0.1 * (job.seconds - self._seconds_per_job)
            if ended:
                self._running = [job for job in self._running if job.running]
                self._changed.notify_all()
            self._rates.append((now, self._engine.completion_tokens))
            while self._rates[0][0] < now - _RATE_SECONDS:
                self._rates.popleft()

    def _rate(self) -> float:
        """Generated tokens per second lately."""
        now, total = time.monotonic(), self._engine.completion_tokens
        recent = [(when, tokens) for when, tokens in self._rates if when >= now - _RATE_SECONDS]
        if not recent or now - recent[0][0] <= 0:
            return 0.0
        return (total - recent[0][1]) / (now - recent[0][0])
