"""Source files of a folder, and what is said of them: definitions, and first uses of what another file defines."""

from __future__ import annotations

import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from fusiontree.errors import DataError

PYTHON = (".py",)
OTHERS = (
    ".c", ".cc", ".cpp", ".cs", ".go", ".h", ".hpp", ".java", ".js", ".jsx", ".kt", ".php", ".rs", ".scala", ".swift",
    ".ts", ".tsx",
)  # fmt: skip
LEFT_OUT = re.compile(r"\..*|(.*_)?tests?|__pycache__|(site|dist)-packages|node_modules|build|dist")  # folders
LARGEST_FILE = 400_000  # bytes; larger ones are generated
LINE = (8, 120)  # characters of a line worth completing, without its indentation
MOST_SNIPPET_LINES = 40
LONELY = ("#", "//", "/*", "*", '"""', "'''")


@dataclass(frozen=True)
class Definition:
    """A named thing that a file defines, with the lines that define it."""

    path: str
    name: str
    text: str


@dataclass(frozen=True)
class Use:
    """The first line of a file, after its imports, that uses what another file defines."""

    path: str
    line: int  # the line's index, from 0
    body: int  # the index of the first line after the imports
    defined: Definition
    others: tuple[Definition, ...]  # what else of other files this one imports and uses


def standard_library() -> Path:
    """The folder of the running Python's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def usable(line: str) -> bool:
    """Is this a line of code worth completing?"""
    bare = line.strip()
    return LINE[0] <= len(bare) <= LINE[1] and not bare.startswith(LONELY)


def snippet(lines: list[str], start: int, end: int) -> str:
    """Lines start … end - 1, not more than forty of them."""
    return "\n".join(lines[start : min(end, start + MOST_SNIPPET_LINES)])


@lru_cache(maxsize=2)
def source_files(root: Path) -> dict[str, str]:
    """Path below the folder -> text of every source file in it, tests and installed packages left out.

    Raises DataError when there is no such folder or not a source file in it.
    """
    if not root.is_dir():
        raise DataError(f"{root}: is not a folder with source files")
    files = dict(_readable(root))
    if not files:
        raise DataError(f"{root}: has no source files; read are {', '.join((*PYTHON, *OTHERS))}")
    return files


def _readable(root: Path) -> Iterator[tuple[str, str]]:
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if not LEFT_OUT.fullmatch(name))
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix not in (*PYTHON, *OTHERS) or not path.is_file() or path.stat().st_size > LARGEST_FILE:
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:  # an old encoding: not text for a model either
                continue
            yield path.relative_to(root).as_posix(), text
