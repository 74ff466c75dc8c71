"""Tables that a command writes into a document, between `<!-- table: NAME -->` and `<!-- end -->`."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

Tables = Mapping[str, Callable[[], Iterable[str]]]


def filled(text: str, tables: Tables) -> str:
    """The document with every table written anew; ValueError where it has no place for one."""
    for name, table in tables.items():
        pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
        content = "\n".join(table()) + "\n"
        text, count = re.subn(pattern, lambda found: found[1] + content + found[2], text, flags=re.DOTALL)  # noqa: B023
        if count != 1:
            raise ValueError(f"the document has {count} places for the table {name}, not one")
    return text


def main(document: Path, tables: Tables) -> None:
    """Print the tables, or with --write put them in the document."""
    if "--write" in sys.argv[1:]:
        document.write_text(filled(document.read_text(encoding="utf-8"), tables), encoding="utf-8")
    else:
        print("\n\n".join("\n".join(table()) for table in tables.values()))
