"""YAML as people expect it: `1e-3` is a number, a key given twice is an error."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from fusiontree.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2 floats (1.1 reads `1e-3` as text) and unique keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((i for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            mark = node.value[twice][0].start_mark
            raise yaml.constructor.ConstructorError(None, None, f"key {keys[twice]!r} is given twice", mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {  # a copy: the parent's table must stay as it is
    first: [pair for pair in pairs if pair[0] != "tag:yaml.org,2002:float"]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"),
    list("-+.0123456789"),
)


def _load(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"{where}: not valid YAML: {_why(error)}") from error


def _why(error: Exception) -> str:
    """What is wrong and at which line, without the drawing that PyYAML adds."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    if mark is None or problem is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {' '.join(problem.split())}"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping a YAML file holds; raises ConfigError when it is missing, unreadable or something else."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: no such config file") from error
    except IsADirectoryError as error:
        raise ConfigError(f"{path}: is a folder; give a YAML file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    content = _load(text, str(path))
    if content is None:
        raise ConfigError(f"{path}: is empty; expected sections (model:, training:, ...)")
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected sections (model:, training:, ...), found {type(content).__name__}")
    return content


def parse_value(text: str, where: str) -> Any:
    """The value of an override, read as YAML (`1e-3`, `true`, `null`, `[a, b]`)."""
    return _load(text, where)


def write_yaml(content: dict[str, Any]) -> str:
    """YAML text that `read_yaml` reads back to the same mapping."""
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
