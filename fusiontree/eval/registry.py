"""Which tasks there are: one table, a family per line. A family's module is imported when it is named."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from importlib import import_module
from typing import Any

from fusiontree.errors import ConfigError
from fusiontree.eval.task import AnyTask, TaskSettings


@dataclass(frozen=True)
class Family:
    """Tasks that are made alike.

    A family of one task has no members and is called by its name alone: `make("")`. Otherwise tasks are called
    `family:member`, the family's name alone means all members, and members may be given as a pattern (`niah_*`).
    An `open` family takes any member name and checks it itself (ConfigError).
    """

    name: str
    about: str  # one line for the list of tasks
    make: Callable[[str], AnyTask]
    members: tuple[str, ...] = ()
    open: bool = False
    reads: tuple[str, ...] = ()  # of limit, seed, lengths, depths, data, official: flags that mean something here
    options: Mapping[str, str] = field(default_factory=dict)  # KEY of KEY=VALUE -> what it does
    # Results by task name -> {"metrics", "tables"} of them all; None: nothing is published over its tasks.
    overall: Callable[[Mapping[str, Mapping[str, Any]]], dict[str, Any]] | None = None


# Family -> "module:name of its Family". Adding a family is a line here and the Family in its module.
FAMILIES: dict[str, str] = {
    "codebase": "fusiontree.eval.tasks.codebase:FAMILY",
    "copy": "fusiontree.eval.tasks.copying:COPY",
    "leval": "fusiontree.eval.tasks.leval:FAMILY",
    "lm_eval": "fusiontree.eval.tasks.lm_eval:FAMILY",
    "longbench": "fusiontree.eval.tasks.longbench:FAMILY",
    "longbench_e": "fusiontree.eval.tasks.longbench:FAMILY_E",
    "longbench_v2": "fusiontree.eval.tasks.longbench_v2:FAMILY",
    "mqar": "fusiontree.eval.tasks.mqar:FAMILY",
    "needle": "fusiontree.eval.tasks.needle:SINGLE",
    "needle_code": "fusiontree.eval.tasks.needle:CODE",
    "needle_multi": "fusiontree.eval.tasks.needle:MULTI",
    "perplexity": "fusiontree.eval.tasks.perplexity:FAMILY",
    "phonebook": "fusiontree.eval.tasks.copying:PHONEBOOK",
    "recall": "fusiontree.eval.tasks.mqar:RECALL",
    "repobench": "fusiontree.eval.tasks.repobench:FAMILY",
    "ruler": "fusiontree.eval.tasks.ruler:FAMILY",
}


def family(name: str) -> Family:
    """The family of this name. ConfigError names those that exist."""
    if name not in FAMILIES:
        raise ConfigError(f"--tasks {name}: there is no such task; there are {', '.join(task_names())}")
    module, _, attribute = FAMILIES[name].partition(":")
    found: Family = getattr(import_module(module), attribute)
    return found


def find_tasks(*names: str) -> list[AnyTask]:
    """The tasks of these names, in that order, each once: "needle", "longbench" (all of it), "ruler:niah_*".

    Raises ConfigError for a name that means no task: what exists.
    """
    if not names:
        raise ConfigError(f"--tasks: name at least one of {', '.join(task_names())}")
    found: dict[str, AnyTask] = {}
    for name in names:
        for task in _tasks(name):
            found.setdefault(task.name, task)
    return list(found.values())


def _tasks(name: str) -> list[AnyTask]:
    head, _, member = name.partition(":")
    group = family(head)
    if group.open and member:
        return [group.make(member)]
    if not group.members:
        if member:
            raise ConfigError(f"--tasks {name}: {head} is one task, called by its name alone")
        if group.open:
            raise ConfigError(f"--tasks {name}: say which, as {head}:NAME")
        return [group.make("")]
    wanted = [each for each in group.members if not member or fnmatchcase(each, member)]
    if not wanted:
        raise ConfigError(f"--tasks {name}: {head} has no such task; it has {', '.join(group.members)}")
    return [group.make(each) for each in wanted]


def task_names() -> list[str]:
    """What can be asked for, a word per family: "needle", "longbench[:…]", "lm_eval:…"."""
    words = []
    for name in sorted(FAMILIES):
        group = family(name)
        words.append(f"{name}:…" if group.open else f"{name}[:…]" if group.members else name)
    return words


def flag(name: str) -> str:
    """A field of TaskSettings as on the command line."""
    return "--corrected" if name == "official" else f"--{name}"


def check_settings(names: Sequence[str], settings: TaskSettings) -> None:
    """ConfigError for a setting or option that none of the tasks named would read."""
    groups = [family(name.partition(":")[0]) for name in names]
    read = {flag for group in groups for flag in group.reads} | {"max_length", "options"}
    for item in fields(TaskSettings):
        if item.name not in read and getattr(settings, item.name) != getattr(TaskSettings(), item.name):
            raise ConfigError(f"{flag(item.name)}: none of {', '.join(names)} reads it")
    known = {key: about for group in groups for key, about in group.options.items()}
    for key in settings.options:
        if key not in known:
            allowed = "; ".join(f"{name} ({about})" for name, about in known.items()) or "none"
            raise ConfigError(f"--option {key}: not known to {', '.join(names)}; allowed: {allowed}")
