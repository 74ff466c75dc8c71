"""Tasks of EleutherAI's lm-evaluation-harness, run by its own runner on a Subject: `lm_eval:NAME`.

The harness builds the requests and scores the answers; what it asks of a model (log-likelihood, rolling log-likelihood,
generation) is answered by the code that all other tasks use. Its own adapter, HFLM, gives the same numbers.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, TypeVar

from fusiontree.errors import ConfigError, DataError
from fusiontree.eval.registry import Family
from fusiontree.eval.subject import Pair, Subject
from fusiontree.eval.task import Progress, TaskSettings
from fusiontree.eval.tasks.options import one_of, whole_numbers

PREFIX = "lm_eval:"
NEW_TOKENS = 256  # the harness's own default
NEW_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
GREEDY_KEYS = {"until", "do_sample", "temperature", *NEW_TOKENS_KEYS}
Answer = TypeVar("Answer")


class Answers:
    """What the harness asks, answered by a subject; batches are kept in `progress`, so that a killed task goes on."""

    def __init__(self, subject: Subject, progress: Progress) -> None:
        self.subject = subject
        self.progress = progress
        self.cut = 0  # contexts shortened from the left, as the harness does with those that are too long

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        """(sum of log-probabilities, whether greedy) for each (context, continuation)."""
        pairs = [self._fitting(*self.subject.encode_pair(*request.args)) for request in requests]
        scores = self._kept("loglikelihood", pairs, [len(c) + len(r) for c, r in pairs], self._score)
        return [(float(total), bool(best)) for total, best in scores]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Log-probability of each whole text."""
        texts = [request.args[0] for request in requests]
        windows = [list(self.subject.windows(self.subject.text.encode(text, special=True))) for text in texts]
        pairs = [pair for row in windows for pair in row]
        scores = iter(self._kept("rolling", pairs, [len(c) + len(r) for c, r in pairs], self._score))
        return [sum(next(scores)[0] for _ in row) for row in windows]

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The greedy continuation of each context, ended before the first of its stops."""
        texts: list[str] = [""] * len(requests)
        manners: dict[tuple[int, tuple[str, ...]], list[int]] = {}
        for place, request in enumerate(requests):
            manners.setdefault(manner(request.args[1]), []).append(place)
        for (new_tokens, stop), places in manners.items():
            rows = [self._room(self.subject.prompt_ids(requests[i].args[0]), new_tokens) for i in places]
            write = partial(self._write, new_tokens, (*stop, *self._end_text()))
            written = self._kept(f"generate {new_tokens} {stop}", rows, [len(row) for row in rows], write)
            for place, text in zip(places, written, strict=True):
                texts[place] = text
        return texts

    def _end_text(self) -> list[str]:
        end = self.subject.tokenizer.eos_token
        return [end] if end else []

    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        return [(sum(scores.tolist()), best) for scores, best in self.subject.score(pairs)]

    def _write(self, new_tokens: int, stop: tuple[str, ...], rows: list[list[int]]) -> list[str]:
        return self.subject.continue_ids(rows, new_tokens, stop)

    def _fitting(self, context: list[int], rest: list[int]) -> Pair:
        room = self.subject.max_length + 1 - len(rest)  # the last token is predicted, not fed
        if room < 1:
            raise DataError(
                f"a continuation of {len(rest)} tokens does not fit the {self.subject.max_length} the model may see"
            )
        return self._last(context, room), rest

    def _room(self, context: list[int], new_tokens: int) -> list[int]:
        room = self.subject.max_length - new_tokens
        if room < 1:
            raise DataError(
                f"{new_tokens} new tokens leave no room for a context: the model may see {self.subject.max_length}"
            )
        return self._last(context, room)

    def _last(self, context: list[int], room: int) -> list[int]:
        self.cut += len(context) > room
        return context[-room:]

    def _kept(
        self, kind: str, items: Sequence[Any], lengths: Sequence[int], answer: Callable[[list[Any]], list[Any]]
    ) -> list[Any]:
        """Answers in the order of the items, computed in batches of like length, each batch once and for all."""
        found: dict[int, Any] = {}
        order = sorted(range(len(items)), key=lambda i: -lengths[i])
        size = self.subject.batch_size
        for begin in range(0, len(order), size):
            places = order[begin : begin + size]
            batch = [items[i] for i in places]
            asked = hashlib.sha256(json.dumps(batch).encode()).hexdigest()[:24]
            found.update(zip(places, self.progress.once(f"{kind} {asked}", partial(answer, batch)), strict=True))
            self.progress(len(found), len(items))
        return [found[i] for i in range(len(items))]


def manner(wishes: Mapping[str, Any]) -> tuple[int, tuple[str, ...]]:
    """New tokens and stops of a request's generation settings. ConfigError when it wants anything but greedy."""
    for key, value in wishes.items():
        if key not in GREEDY_KEYS or (key in ("do_sample", "temperature") and value):
            raise ConfigError(f"the task asks for generation with {key}={value!r}; only greedy generation is done here")
    until = wishes.get("until") or []
    new_tokens = next((wishes[key] for key in NEW_TOKENS_KEYS if wishes.get(key) is not None), NEW_TOKENS)
    return int(new_tokens), (until,) if isinstance(until, str) else tuple(until)


def harness_model(subject: Subject, progress: Progress) -> Any:
    """An `lm_eval.api.model.LM` over a subject."""
    from lm_eval.api.model import LM

    class SubjectLM(LM):  # type: ignore[misc, unused-ignore]
        """The harness's view of a subject."""

        def __init__(self) -> None:
            super().__init__()
            self.answers = Answers(subject, progress)
            self.tokenizer = subject.tokenizer
            self.max_length = subject.max_length
            self.batch_size = subject.batch_size
            self.eot_token_id = subject.tokenizer.eos_token_id
            self._device = subject.device

        def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
            return self.answers.loglikelihood(requests)

        def loglikelihood_rolling(self, requests: Any) -> list[float]:
            return self.answers.loglikelihood_rolling(requests)

        def generate_until(self, requests: Any) -> list[str]:
            return self.answers.generate_until(requests)

        @property
        def tokenizer_name(self) -> str:
            return subject.name.replace("/", "__")

        def chat_template(self, chat_template: bool | str = False) -> str:
            return (subject.tokenizer.chat_template or "") if chat_template else ""

        def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
            text: str = subject.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
            return text

    return SubjectLM()


class HarnessTask:
    """One task, group or tag of the harness."""

    version = 1

    def __init__(self, member: str) -> None:
        self.member = member
        self.name = PREFIX + member
        self.main_metric = ""  # known when measured: the first metric of the task

    def measure(self, subject: Subject, settings: TaskSettings, progress: Progress) -> dict[str, Any]:
        """Runs `lm_eval.simple_evaluate`; table `tasks`: version, shots and samples of each task that was run."""
        wishes = {
            "limit": settings.limit,
            "num_fewshot": next(iter(whole_numbers(settings, "num_fewshot", (), least=0)), None),
            "apply_chat_template": one_of(settings, "chat_template", ("no", "yes")) == "yes",
        }
        simple_evaluate = _harness()
        manager, tasks = _load(self.member, settings)
        model = harness_model(subject, progress)
        found = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=1000, **wishes)
        return self._result(found, model.answers.cut)

    def _result(self, found: Mapping[str, Any], cut: int) -> dict[str, Any]:
        metrics, errors = _metrics(self.member, found["results"])
        self.main_metric = next(iter(metrics), "")
        tasks = {
            name: {
                "version": found["versions"].get(name),
                "num_fewshot": found["n-shot"].get(name),
                "samples": found["n-samples"].get(name, {}).get("effective"),
            }
            for name in found["results"]
        }
        samples = [
            json.loads(json.dumps({"task": name, **sample}, default=str))
            for name, some in found["samples"].items()
            for sample in some
        ]
        tables = {"tasks": tasks, "harness": {"lm_eval": found.get("lm_eval_version"), "contexts_cut": cut}}
        return {"metrics": metrics, "errors": errors, "tables": tables, "samples": samples}


def _metrics(member: str, results: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics and errors by name: "acc", with a filter "exact_match:strict", of a group's members "member/acc"."""
    metrics: dict[str, float] = {}
    errors: dict[str, float] = {}
    ordered = sorted(results.items(), key=lambda item: item[0] != member)
    for task, values in ordered:
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if not chosen or not isinstance(value, (int, float)):
                continue
            metric, error = name.removesuffix("_stderr"), name.endswith("_stderr")
            full = "/".join(([task] if task != member else []) + [metric + (f":{chosen}" if chosen != "none" else "")])
            (errors if error else metrics)[full] = float(value)
    return metrics, errors


def _harness() -> Callable[..., Any]:
    try:
        from lm_eval import simple_evaluate
    except ImportError:
        raise ConfigError("lm_eval: lm-evaluation-harness is not installed: pip install 'fusiontree[eval]'") from None
    found: Callable[..., Any] = simple_evaluate
    return found


@lru_cache(maxsize=4)
def _manager(folder: str | None, defaults: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=folder, include_defaults=defaults)


def _load(member: str, settings: TaskSettings) -> tuple[Any, list[Any]]:
    """The task manager that knows `member`, and the task or group; own YAML files in `settings.data` come first."""
    folder = None if settings.data is None else str(settings.data)
    if settings.data is not None and not settings.data.is_dir():
        raise DataError(f"{settings.data}: lm_eval takes a folder with task YAML files as --data")
    # The index of the fifteen thousand tasks that come with the harness takes a while to read.
    managers = (_manager(folder, own) for own in ((False, True) if folder else (True,)))
    for manager in managers:
        if member in manager.all_tasks:
            return manager, _loaded(manager, member)
    near = ", ".join(difflib.get_close_matches(member, manager.all_tasks)) or "see lm-eval ls tasks"
    raise ConfigError(f"--tasks {PREFIX}{member}: lm-evaluation-harness has no such task; near: {near}")


def _loaded(manager: Any, member: str) -> list[Any]:
    try:
        found = manager.load([member])
    except IndexError:  # the harness looks at the first question
        raise DataError(f"{PREFIX}{member}: there is not one question in its data") from None
    except Exception as error:  # whatever a task's own code and the data sets library raise
        reason = " ".join((str(error) or type(error).__name__).split())[:200]
        raise DataError(f"{PREFIX}{member}: the task or its data cannot be had: {reason}") from error
    for name, task in found["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise ConfigError(f"{PREFIX}{member}: {name} runs code that the model writes; that is not done here")
    groups: Mapping[str, Any] = found.get("groups", {})
    return [groups[member]] if member in groups else list(found["tasks"].values())


FAMILY = Family(
    "lm_eval",
    "a task of lm-evaluation-harness, through its own runner; --data: folder with further task YAML files",
    HarnessTask,
    open=True,
    reads=("limit", "data"),
    options={
        "num_fewshot": "examples before each question; left out: the task's own",
        "chat_template": "yes or no (the default): put questions through the tokenizer's chat template",
    },
)
