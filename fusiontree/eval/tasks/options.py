"""Reading the KEY=VALUE options of tasks, with one clear line for a value that does not do."""

from __future__ import annotations

from fusiontree.errors import ConfigError
from fusiontree.eval.task import TaskSettings


def whole_number(settings: TaskSettings, key: str, default: int, least: int = 1) -> int:
    """The option as an integer of at least `least`."""
    return whole_numbers(settings, key, (default,), least)[0]


def whole_numbers(settings: TaskSettings, key: str, default: tuple[int, ...], least: int = 1) -> tuple[int, ...]:
    """The option as integers separated by commas, each at least `least`."""
    value = settings.options.get(key)
    if value is None:
        return default
    words = value.split(",")
    if not all(word.strip().isdecimal() and int(word) >= least for word in words):
        raise ConfigError(f"--option {key}={value}: must be whole numbers of at least {least}, separated by commas")
    return tuple(int(word) for word in words)


def one_of(settings: TaskSettings, key: str, allowed: tuple[str, ...]) -> str:
    """The option as one of the words allowed, the first of which is the default."""
    value = settings.options.get(key, allowed[0])
    if value not in allowed:
        raise ConfigError(f"--option {key}={value}: allowed: {', '.join(allowed)}")
    return value
