"""Source files of other languages, by their words alone: definitions, imports and first uses.

A name counts when one file of the folder alone defines it, and a file uses it when one of its import lines names it
or the file that defines it. Much is missed (languages that import nothing within a package); what is found is right.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import PurePosixPath

from fusiontree.eval.tasks.codebase.source import Definition, Use, snippet, usable

DEFINITION = re.compile(
    r"^[ \t]{0,4}(?:(?:export|default|public|private|protected|internal|static|final|abstract|async|pub(?:\(\w+\))?|"
    r"open|data|sealed)\s+)*"
    r"(?:class|interface|struct|enum|trait|type|function|func|fun|fn|object|protocol|const|let|val|var|#define)\s+"
    r"(?:\([^)]*\)\s*)?(\w{3,})"
)
IMPORT = re.compile(
    r"^\s*(?:(?:import|use|using|require|#?include|from)\b|\}\s*from\b|export\s*\{|(?:const|let|var)\b.*=\s*require\b)"
)
WORD = re.compile(r"\w+")


class OtherFiles:
    """Source files that are not Python. `files`: path -> text."""

    def __init__(self, files: Mapping[str, str]) -> None:
        self.files = files
        self.defined = _definitions(files)

    def uses(self, path: str) -> list[Use]:
        """First uses in this file of names that another one defines, in the order of its lines."""
        lines = self.files[path].split("\n")
        imports = [number for number, line in enumerate(lines) if IMPORT.match(line)]
        if not imports:
            return []
        named = {word for number in imports for word in WORD.findall(lines[number])}
        body = imports[-1] + 1
        first: dict[Definition, int] = {}
        for number in range(body, len(lines)):
            for word in WORD.findall(lines[number]) if usable(lines[number]) else ():
                each = self.defined.get(word)
                if each and each.path != path and named & {word, PurePosixPath(each.path).stem}:
                    first.setdefault(each, number)
        return [Use(path, line, body, each, tuple(o for o in first if o != each)) for each, line in first.items()]


def _definitions(files: Mapping[str, str]) -> dict[str, Definition]:
    """Names that exactly one file defines."""
    found: dict[str, list[Definition]] = defaultdict(list)
    for path, text in files.items():
        lines = text.split("\n")
        for number, line in enumerate(lines):
            match = DEFINITION.match(line)
            if match:
                text = snippet(lines, number, _end(lines, number))
                found[match.group(1)].append(Definition(path, match.group(1), text))
    return {name: places[0] for name, places in found.items() if len({each.path for each in places}) == 1}


def _end(lines: list[str], start: int) -> int:
    """The index after a definition: past the line that closes it at its own indentation, or the next blank line."""
    indent = len(lines[start]) - len(lines[start].lstrip())
    for number in range(start + 1, len(lines)):
        line = lines[number]
        if line.strip() and len(line) - len(line.lstrip()) <= indent:
            return number + 1 if line.strip()[0] in "})" else number
    return len(lines)
